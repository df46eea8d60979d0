//! Attention in blocks of queries and keys with a running softmax: Dao et al. 2022, <https://arxiv.org/abs/2205.14135>.
//! Scores exist one block at a time, in f32. Both products run on the micro-kernels of the linear layers, the keys and
//! values laid as panels of weights are.

use crate::kernels::Mask;
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::epilogue::Target;
use crate::kernels::cpu::gemm::Block;
use crate::kernels::cpu::micro::{A_BYTES, A_STRIDE, Call, Micro, Operands, PANEL};
use crate::kernels::cpu::packed::Aligned;
use crate::kernels::cpu::parallel::{Scratch, Shared, for_each, threads, with_scratch};
use crate::kernels::cpu::simd;
use crate::kernels::cpu::softmax::Row;
use crate::kernels::cpu::streaming_pack::{BLOCK, Lines, WORD, turn};

use std::ops::Range;

/// Queries of a block, at most.
const QUERIES: usize = 336;
/// Keys of a block: as many f32 probabilities as a row of a block holds.
const KEYS: usize = A_BYTES / 4;

/// `[B, L, heads · D]` with unit stride in the last axis.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a, T> {
    pub(crate) numbers: &'a [T],
    pub(crate) sample_stride: usize,
    pub(crate) token_stride: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) heads: usize,
    /// `D`
    pub(crate) depth: usize,
}

struct Attention<'a, T> {
    q: Tokens<'a, T>,
    k: Tokens<'a, T>,
    v: Tokens<'a, T>,
    size: Size,
    mask: Mask,
    micro: Micro,
}

/// Keys and values of every head as panels, made once for all blocks of queries.
struct Laid {
    /// `[head of a sample, block of keys, 2]` times `side` bytes: the keys of the block, then its values.
    memory: Aligned,
    side: usize,
    /// Blocks of keys.
    blocks: usize,
}

impl Laid {
    fn keys(&self, pair: usize, block: usize) -> *mut u8 {
        self.memory.at((pair * self.blocks + block) * 2 * self.side)
    }

    fn values(&self, pair: usize, block: usize) -> *mut u8 {
        self.keys(pair, block).wrapping_add(self.side)
    }
}

/// Gives `[B, Lq, heads · D]`.
pub(crate) fn attention<T: Element>(q: Tokens<T>, k: Tokens<T>, v: Tokens<T>, size: Size, mask: Mask) -> Vec<T> {
    let Size { batch, queries, keys, heads, depth } = size;
    let count = batch * queries * heads * depth;
    if keys == 0 || count == 0 {
        return vec![T::zero(); count];
    }
    let mut out = T::unwritten(count);
    let micro = Micro::new(!T::IS_F32);
    let pairs = batch * heads;
    let wanted = (4 * threads()).div_ceil(pairs).min(queries.div_ceil(4 * micro.rows));
    let blocks = queries.div_ceil(QUERIES).max(wanted);
    let block = queries.div_ceil(blocks).next_multiple_of(micro.rows);
    let blocks = queries.div_ceil(block);
    let work = Attention { q, k, v, size, mask, micro };
    let laid = work.lay();
    let shared = Shared::new(&mut out);
    for_each(pairs * blocks, 2 * pairs * queries * keys * depth, |task| {
        let (pair, start) = (task / blocks, (task % blocks) * block);
        let rows = start..(start + block).min(queries);
        with_scratch(|scratch| work.block(pair, rows, &laid, &shared, scratch));
    });
    out
}

/// A left operand in blocks of at most [`A_BYTES`] of depth each, and a right one in panels.
struct Sides {
    /// Rows of a block, the micro-kernel's filling included.
    rows: usize,
    /// Numbers of the depth, filled up to a multiple of 32.
    depth: usize,
    /// Numbers of the depth in one block.
    step: usize,
}

impl<T: Element> Attention<'_, T> {
    fn sides(&self, rows: usize, depth: usize) -> Sides {
        let depth = depth.next_multiple_of(PANEL);
        let longest = if T::IS_F32 { 128 } else { A_BYTES / self.micro.operands.size() };
        Sides { rows: rows.next_multiple_of(self.micro.rows), depth, step: depth.min(longest) }
    }

    fn lay(&self) -> Laid {
        let Size { batch, keys, heads, depth, .. } = self.size;
        let (pairs, blocks) = (batch * heads, keys.div_ceil(KEYS));
        let columns = depth.next_multiple_of(PANEL);
        let side = KEYS.min(keys.next_multiple_of(PANEL)) * columns * self.micro.operands.size();
        let laid = Laid { memory: Aligned::unwritten(pairs * blocks * 2 * side), side, blocks };
        for_each(pairs * blocks, 2 * pairs * keys * columns, |task| {
            let (pair, block) = (task / blocks, task % blocks);
            let range = block * KEYS..(block * KEYS + KEYS).min(keys);
            self.lay_keys(self.at(&self.k, pair), range.clone(), laid.keys(pair, block));
            self.lay_values(self.at(&self.v, pair), range, laid.values(pair, block));
        });
        laid
    }

    /// Where the first token of head `pair` stands, heads counted over all samples.
    fn at(&self, tokens: &Tokens<T>, pair: usize) -> usize {
        pair / self.size.heads * tokens.sample_stride + pair % self.size.heads * self.size.depth
    }

    /// One head of one sample, queries `rows`.
    fn block(&self, pair: usize, rows: Range<usize>, laid: &Laid, out: &Shared<T>, scratch: &mut Scratch) {
        self.micro.within(|| self.within(pair, rows, laid, out, scratch));
    }

    #[expect(unsafe_code, reason = "rows of a result that is shared with other tasks, and operands of micro-kernels")]
    fn within(&self, pair: usize, rows: Range<usize>, laid: &Laid, out: &Shared<T>, scratch: &mut Scratch) {
        let Size { queries, keys, heads, depth, .. } = self.size;
        let count = rows.len();
        let (sample, head) = (pair / heads, pair % heads);
        let Scratch { rows: wide_q, sums, values, scores, marks, .. } = scratch;

        let over_depth = self.sides(count, depth);
        let padded = over_depth.rows;
        let blocks = over_depth.depth.div_ceil(over_depth.step);
        let q = wide_q.at_least(blocks * padded * A_STRIDE);
        for (i, first) in (0..depth).step_by(over_depth.step).enumerate() {
            // SAFETY: each block has `padded` rows.
            let block = unsafe { Block::new(q.wrapping_add(i * padded * A_STRIDE), self.micro.operands) };
            let wide = over_depth.step.min(over_depth.depth - first);
            let taken = over_depth.step.min(depth - first);
            for (to, row) in rows.clone().enumerate() {
                let start = self.at(&self.q, pair) + row * self.q.token_stride + first;
                block.put(to, 0, &self.q.numbers[start..start + taken]);
                block.clear(to, taken, wide - taken);
            }
        }

        let columns = over_depth.depth; // of the values, filled up to whole panels
        let sums = sums.at_least(columns * padded * 4).cast::<f32>(); // [panel, rows, 32]
        let p = values.at_least(padded * A_STRIDE);
        // SAFETY: there are `padded` rows.
        let p_block = unsafe { Block::new(p, self.micro.operands) };
        let scores = scores.at_least(KEYS * padded * 4).cast::<f32>(); // [panel, rows, 32]
        marks.clear();
        marks.resize(count, Mark { greatest: f32::NEG_INFINITY, total: 0.0 });

        let end = match self.mask {
            Mask::None => keys,
            Mask::Causal => keys.min(rows.end),
        };
        let factor = (std::f64::consts::LOG2_E / (depth as f64).sqrt()) as f32;
        for first in (0..end).step_by(KEYS) {
            // Of the whole block, as its panels are; what lies behind the end of a mask is not seen.
            let width = KEYS.min(keys - first);
            let over_keys = self.sides(count, width);
            let k = laid.keys(pair, first / KEYS);
            self.multiply(&over_depth, q, k, over_keys.depth / PANEL, scores, false);

            // Probabilities take the place of a left operand, in blocks of the depth as micro-kernels take it.
            for (i, mark) in marks.iter_mut().enumerate() {
                let seen = match self.mask {
                    Mask::None => width,
                    Mask::Causal => (rows.start + i + 1).saturating_sub(first).min(width),
                };
                // SAFETY: row `i` of every panel of scores was written by the product.
                let line = unsafe { Scores::new(scores.wrapping_add(i * PANEL), padded * PANEL) };
                let before = mark.greatest;
                let row = Row {
                    scores: line,
                    seen,
                    keys: over_keys.depth,
                    factor,
                    operands: self.micro.operands,
                    to: p.wrapping_add(i * A_STRIDE),
                };
                let now = row.greatest(before);
                if now == f32::NEG_INFINITY {
                    p_block.clear(i, 0, over_keys.depth);
                    continue;
                }
                // SAFETY: a row of the block holds the operands of all keys of this step.
                let total = unsafe { row.powers(now) };
                if now > before && before > f32::NEG_INFINITY {
                    let shrink = ((before - now) * factor).exp2();
                    mark.total *= shrink;
                    for panel in 0..columns / PANEL {
                        let start = sums.wrapping_add((panel * padded + i) * PANEL);
                        // SAFETY: a row of 32 sums of this task.
                        simd::scale(unsafe { std::slice::from_raw_parts_mut(start, PANEL) }, shrink);
                    }
                }
                mark.total += total;
                mark.greatest = now;
            }
            let v = laid.values(pair, first / KEYS);
            let whole = Sides { step: over_keys.depth, ..over_keys };
            self.multiply(&whole, p, v, columns / PANEL, sums, first > 0);
        }
        // SAFETY: this head of these queries belongs to this task, and lies within the result.
        let target = unsafe { Target::new(out.at(0)) };
        for (i, row) in rows.enumerate() {
            for start in (0..depth).step_by(PANEL) {
                let from = sums.wrapping_add((start / PANEL * padded + i) * PANEL);
                // SAFETY: a row of 32 sums of this task.
                let from = unsafe { std::slice::from_raw_parts(from, PANEL) };
                let line =
                    target.line(((sample * queries + row) * heads + head) * depth + start, PANEL.min(depth - start));
                simd::round_scaled(from, 1.0 / marks[i].total, line);
            }
        }
    }

    /// Every panel of `b` with all rows; sums are `[panel, rows, 32]`.
    #[expect(unsafe_code, reason = "micro-kernels take pointers")]
    fn multiply(&self, sides: &Sides, a: *const u8, b: *const u8, panels: usize, sums: *mut f32, add: bool) {
        let size = self.micro.operands.size();
        for panel in 0..panels {
            for (i, first) in (0..sides.depth).step_by(sides.step).enumerate() {
                let b = b.wrapping_add((panel * sides.depth + first) * PANEL * size);
                let depth = sides.step.min(sides.depth - first);
                for row in (0..sides.rows).step_by(self.micro.rows) {
                    let call = Call {
                        a: a.wrapping_add((i * sides.rows + row) * A_STRIDE),
                        b,
                        depth,
                        c: sums.wrapping_add((panel * sides.rows + row) * PANEL),
                        rows: self.micro.rows,
                        add: add || i > 0,
                    };
                    // SAFETY: operands and sums are laid for whole micro-tiles and multiples of 32 of the depth.
                    unsafe { self.micro.run(&call) }
                }
            }
        }
    }

    /// Keys `range` as panels `[D, 32]` of 32 keys each, filled up with zeros.
    #[expect(unsafe_code, reason = "memory seen as numbers")]
    fn lay_keys(&self, at: usize, range: Range<usize>, start: *mut u8) {
        let depth = self.size.depth;
        let padded = depth.next_multiple_of(PANEL);
        let panels = range.len().div_ceil(PANEL);
        let count = panels * padded * PANEL;
        let size = self.micro.operands.size();
        let words = padded * size / WORD;
        let token = |n: usize| {
            let start = at + (range.start + n) * self.k.token_stride;
            &self.k.numbers[start..start + depth]
        };
        for p in 0..panels {
            let lines = PANEL.min(range.len() - p * PANEL);
            if size == size_of::<T>() {
                let to = start.cast::<u32>().wrapping_add(p * words * PANEL);
                // SAFETY: as many words are there, for this task alone; any bits are a number. What is left in those of the
                // next panel is written after, and behind the last panel the values are laid after the keys.
                let to = unsafe { std::slice::from_raw_parts_mut(to, (words + BLOCK) * PANEL) };
                let first = at + (range.start + p * PANEL) * self.k.token_stride;
                let from = Lines::new(&self.k.numbers[first..], self.k.token_stride, (lines, depth));
                turn(from, words, to);
                continue;
            }
            // SAFETY: as above.
            let to = unsafe { std::slice::from_raw_parts_mut(start.cast::<f32>(), count) };
            let to = &mut to[p * padded * PANEL..(p + 1) * padded * PANEL];
            if lines < PANEL || depth < padded {
                to.fill(0.0);
            }
            for n in 0..lines {
                for (to, from) in to.iter_mut().skip(n).step_by(PANEL).zip(token(p * PANEL + n)) {
                    *to = from.widen();
                }
            }
        }
    }

    /// Values `range` as panels `[keys, 32]` of 32 channels each, filled up with zeros to a multiple of 32 keys.
    #[expect(unsafe_code, reason = "memory seen as numbers")]
    fn lay_values(&self, at: usize, range: Range<usize>, start: *mut u8) {
        let depth = self.size.depth;
        let padded = range.len().next_multiple_of(PANEL);
        let panels = depth.div_ceil(PANEL);
        let zeros = [T::zero(); PANEL];
        let count = panels * padded * PANEL;
        for p in 0..panels {
            let columns = PANEL.min(depth - p * PANEL);
            let token = |n: usize| {
                let start = at + (range.start + n) * self.v.token_stride + p * PANEL;
                &self.v.numbers[start..start + columns]
            };
            match self.micro.operands {
                Operands::F32 => {
                    // SAFETY: `count` numbers are there, for this task alone.
                    let to = unsafe { std::slice::from_raw_parts_mut(start.cast::<f32>(), count) };
                    let to = &mut to[p * padded * PANEL..(p + 1) * padded * PANEL];
                    for (n, to) in to.chunks_exact_mut(PANEL).enumerate() {
                        if n < range.len() {
                            simd::widen_slice(token(n), &mut to[..columns]);
                            to[columns..].fill(0.0);
                        } else {
                            to.fill(0.0);
                        }
                    }
                }
                _ => {
                    // SAFETY: as above; the numbers are bf16.
                    let to = unsafe { std::slice::from_raw_parts_mut(start.cast::<T>(), count) };
                    let to = &mut to[p * padded * PANEL..(p + 1) * padded * PANEL];
                    if columns < PANEL || range.len() < padded {
                        to.fill(T::zero());
                    }
                    for (i, to) in to.chunks_exact_mut(2 * PANEL).take(range.len().div_ceil(2)).enumerate() {
                        let odd = if 2 * i + 1 < range.len() { token(2 * i + 1) } else { &zeros[..columns] };
                        simd::interleave(token(2 * i), odd, to);
                    }
                }
            }
        }
    }
}

/// The running softmax of one query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    /// Of the scores so far, before the factor.
    greatest: f32,
    total: f32,
}

/// Lines of 32 numbers, some distance apart.
#[derive(Clone, Copy)]
pub(crate) struct Scores {
    start: *const f32,
    stride: usize,
}

impl Scores {
    /// # Safety
    /// Every line that is asked for is there, and nothing writes it meanwhile.
    #[expect(unsafe_code, reason = "rows of tiles are read by their strides")]
    unsafe fn new(start: *const f32, stride: usize) -> Self {
        Self { start, stride }
    }

    #[expect(unsafe_code, reason = "rows of tiles are read by their strides")]
    #[inline(always)]
    pub(crate) fn at<'a>(self, line: usize) -> &'a [f32; PANEL] {
        // SAFETY: that of `new`.
        unsafe { &*self.start.wrapping_add(line * self.stride).cast::<[f32; PANEL]>() }
    }
}
