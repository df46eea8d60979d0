//! Attention in blocks of queries and keys with a running softmax: Dao et al. 2022, <https://arxiv.org/abs/2205.14135>.
//! Scores exist one block at a time, in f32. Both products run on the micro-kernels of the linear layers, with the keys and
//! values packed as panels of weights are.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::ParallelSliceMut;

use crate::kernels::cpu::aligned::{UninitBuffer, uninit_numbers};
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::elementwise::{round_scaled, scale};
use crate::kernels::cpu::gemm::F32_CHAIN;
use crate::kernels::cpu::micro::MicroKernel;
use crate::kernels::cpu::micro::tile::{A_BYTES, Operands, PANEL, TileCall};
use crate::kernels::cpu::parallel::{OutputTiles, for_each, for_each_part, threads};
use crate::kernels::cpu::row_block::{ROW_F32S, RowBlock};
use crate::kernels::cpu::scratch::{Scratch, with_scratch};
use crate::kernels::cpu::simd::multiversion;
use crate::kernels::cpu::softmax::{ScoreRow, SoftmaxRow, SoftmaxState};
use crate::kernels::cpu::transpose::{BLOCK, Lines, WORD, transpose_words};
use crate::kernels::mask::Mask;

/// Queries of a block, at most.
const MAX_QUERIES: usize = 336;
/// Keys of a block: as many as there are f32 in the row of a left operand.
const KEYS: usize = A_BYTES / 4;

/// `[B, L, heads · D]` with unit stride in the last axis.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a, T> {
    pub(crate) numbers: &'a [T],
    pub(crate) sample_stride: usize,
    pub(crate) token_stride: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct AttentionShape {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) heads: usize,
    /// `D`
    pub(crate) depth: usize,
}

/// One call of attention.
pub(crate) struct AttentionTask<'a, T> {
    pub(crate) q: Tokens<'a, T>,
    pub(crate) k: Tokens<'a, T>,
    pub(crate) v: Tokens<'a, T>,
    pub(crate) shape: AttentionShape,
    pub(crate) mask: Mask,
}

struct Attention<'a, T> {
    task: &'a AttentionTask<'a, T>,
    micro: MicroKernel,
    /// Scales scores to exponents of 2.
    factor: f32,
}

/// Keys and values of every head as panels, packed once for all blocks of queries. A *pair* is one head of one sample.
struct PackedKeysValues {
    /// `[pair, block of keys, 2]` times `side` bytes: the keys of the block, then its values.
    memory: UninitBuffer,
    side: usize,
    /// Blocks of keys.
    blocks: usize,
}

impl PackedKeysValues {
    /// The panels of the keys and of the values.
    fn block(&self, pair: usize, block: usize) -> (&[MaybeUninit<u8>], &[MaybeUninit<u8>]) {
        self.memory.as_slice()[(pair * self.blocks + block) * 2 * self.side..][..2 * self.side].split_at(self.side)
    }
}

/// Returns `[B, Lq, heads · D]`.
#[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
pub(crate) fn attention<T: Element>(task: &AttentionTask<T>) -> Vec<T> {
    let AttentionShape { batch, queries, keys, heads, depth } = task.shape;
    let count = batch * queries * heads * depth;
    if keys == 0 || count == 0 {
        return vec![T::zero(); count];
    }
    let micro = MicroKernel::new(!T::IS_F32);
    let pairs = batch * heads;
    let wanted = (4 * threads()).div_ceil(pairs).min(queries.div_ceil(4 * micro.rows));
    let blocks = queries.div_ceil(MAX_QUERIES).max(wanted);
    let block = queries.div_ceil(blocks).next_multiple_of(micro.rows);
    let blocks = queries.div_ceil(block);
    let factor = (std::f64::consts::LOG2_E / (depth as f64).sqrt()) as f32;
    let work = Attention { task, micro, factor };
    let packed = work.pack_keys_values();
    let mut out = Box::new_uninit_slice(count);
    // SAFETY: every task writes its own queries of its own head, each line once.
    let tiles = unsafe { OutputTiles::new(&mut out) };
    for_each(pairs * blocks, 2 * pairs * queries * keys * depth, |task| {
        let (pair, start) = (task / blocks, (task % blocks) * block);
        let rows = start..(start + block).min(queries);
        with_scratch(|scratch| work.attend(work.query_block(pair, rows, scratch), &packed, tiles));
    });
    // SAFETY: the tasks cover all queries of all heads.
    unsafe { out.assume_init() }.into_vec()
}

/// The shape of a product: a left operand in blocks of at most [`A_BYTES`] of depth each, and a right one in panels.
#[derive(Clone, Copy)]
struct ProductShape {
    /// Rows of a block, padded for the micro-kernel.
    rows: usize,
    /// Numbers of the depth, padded to a multiple of 32.
    depth: usize,
    /// Numbers of the depth in one block.
    step: usize,
}

/// All rows of `a` times panels of `b`.
struct ScoreProduct<'a> {
    shape: ProductShape,
    a: &'a RowBlock<'a>,
    b: &'a [MaybeUninit<u8>],
    /// Adds to the sums.
    add: bool,
}

/// A block of queries of one head, and its scratch memory.
struct QueryBlock<'a> {
    pair: usize,
    /// Queries.
    rows: Range<usize>,
    /// The product of the queries with the keys.
    shape: ProductShape,
    /// The queries, `[blocks of the depth, rows]`.
    q: RowBlock<'a>,
    /// The powers of the scores: the left operand of the product with the values.
    p: RowBlock<'a>,
    /// `[panel, rows, 32]`
    scores: &'a mut [f32],
    /// The products with the values, `[panel, rows, 32]`.
    sums: &'a mut [f32],
    softmax: &'a mut [SoftmaxState],
}

impl<T: Element> Attention<'_, T> {
    fn product_shape(&self, rows: usize, depth: usize) -> ProductShape {
        let depth = depth.next_multiple_of(PANEL);
        let longest = if T::IS_F32 { F32_CHAIN } else { A_BYTES / self.micro.operands.size() };
        ProductShape { rows: rows.next_multiple_of(self.micro.rows), depth, step: depth.min(longest) }
    }

    fn pack_keys_values(&self) -> PackedKeysValues {
        let AttentionShape { batch, keys, heads, depth, .. } = self.task.shape;
        let (pairs, blocks) = (batch * heads, keys.div_ceil(KEYS));
        let columns = depth.next_multiple_of(PANEL);
        let side = KEYS.min(keys.next_multiple_of(PANEL)) * columns * self.micro.operands.size();
        let mut memory = UninitBuffer::new(pairs * blocks * 2 * side);
        let parts = memory.as_mut_words().par_chunks_mut(2 * side / WORD);
        for_each_part(parts, 2 * pairs * keys * columns, |task, to| {
            let (pair, block) = (task / blocks, task % blocks);
            let range = block * KEYS..(block * KEYS + KEYS).min(keys);
            self.pack_keys(pair, range.clone(), to);
            self.pack_values(pair, range, &mut to[side / WORD..]);
        });
        PackedKeysValues { memory, side, blocks }
    }

    /// The index of the first token of a head.
    fn first_token(&self, tokens: &Tokens<T>, pair: usize) -> usize {
        let AttentionShape { heads, depth, .. } = self.task.shape;
        pair / heads * tokens.sample_stride + pair % heads * depth
    }

    /// Computes a block of queries.
    fn attend(&self, mut block: QueryBlock, packed: &PackedKeysValues, out: OutputTiles<T>) {
        let keys = match self.task.mask {
            Mask::None => self.task.shape.keys,
            Mask::Causal => self.task.shape.keys.min(block.rows.end),
        };
        self.micro.on_thread(|| {
            self.pack_queries(&mut block);
            for first in (0..keys).step_by(KEYS) {
                self.attend_to_keys(&mut block, first, packed);
            }
            self.write(&block, out);
        });
    }

    fn query_block<'a>(&self, pair: usize, rows: Range<usize>, scratch: &'a mut Scratch) -> QueryBlock<'a> {
        let Scratch { rows: q, sums, values, scores, softmax, .. } = scratch;
        let operands = self.micro.operands;
        let shape = self.product_shape(rows.len(), self.task.shape.depth);
        let blocks = shape.depth.div_ceil(shape.step);
        softmax.clear();
        softmax.resize(rows.len(), SoftmaxState::EMPTY);
        QueryBlock {
            pair,
            rows,
            q: RowBlock::new(q.scratch(blocks * shape.rows * ROW_F32S), operands),
            p: RowBlock::new(values.scratch(shape.rows * ROW_F32S), operands),
            scores: scores.scratch(KEYS * shape.rows),
            sums: sums.scratch(shape.depth * shape.rows),
            softmax,
            shape,
        }
    }

    fn pack_queries(&self, block: &mut QueryBlock) {
        let (tokens, depth, shape) = (&self.task.q, self.task.shape.depth, block.shape);
        let head = self.first_token(tokens, block.pair);
        for (i, first) in (0..depth).step_by(shape.step).enumerate() {
            let padded = shape.step.min(shape.depth - first);
            let taken = shape.step.min(depth - first);
            for (to, row) in block.rows.clone().enumerate() {
                let start = head + row * tokens.token_stride + first;
                block.q.write(i * shape.rows + to, 0, &tokens.numbers[start..start + taken]);
                block.q.clear(i * shape.rows + to, taken, padded - taken);
            }
        }
    }

    /// Adds one block of keys, which begins with key `first`, to the running softmax and the sums of the values.
    fn attend_to_keys(&self, block: &mut QueryBlock, first: usize, packed: &PackedKeysValues) {
        // All keys of the block, as the panels have them; the softmax ignores those that the mask hides.
        let width = KEYS.min(self.task.shape.keys - first);
        let over_keys = self.product_shape(block.rows.len(), width);
        let (k, v) = packed.block(block.pair, first / KEYS);
        let scores = &mut block.scores[..over_keys.depth * block.shape.rows];
        self.multiply(&ScoreProduct { shape: block.shape, a: &block.q, b: k, add: false }, scores);
        for row in 0..block.rows.len() {
            let visible = match self.task.mask {
                Mask::None => width,
                Mask::Causal => (block.rows.start + row + 1).saturating_sub(first).min(width),
            };
            self.update_softmax(block, row, visible, over_keys.depth);
        }
        let over_keys = ProductShape { step: over_keys.depth, ..over_keys };
        self.multiply(&ScoreProduct { shape: over_keys, a: &block.p, b: v, add: first > 0 }, block.sums);
    }

    /// Writes the powers of one row of scores, and scales the sums so far if the maximum has grown.
    #[expect(unsafe_code, reason = "scores are read without a check of their bounds")]
    #[inline]
    fn update_softmax(&self, block: &mut QueryBlock, row: usize, visible: usize, keys: usize) {
        let stride = block.shape.rows * PANEL;
        let scores = &block.scores[row * PANEL..][..(keys / PANEL - 1) * stride + PANEL];
        // SAFETY: the slice ends with the last of `keys / 32` lines, `stride` apart.
        let scores = unsafe { ScoreRow::new(scores, stride) };
        let factor = self.factor;
        let softmax_row = SoftmaxRow { scores, visible, keys, factor, operands: self.micro.operands };
        let state = &mut block.softmax[row];
        let before = state.max;
        let max = softmax_row.max(before);
        if max == f32::NEG_INFINITY {
            return block.p.clear(row, 0, keys);
        }
        let sum = softmax_row.powers(max, block.p.row_mut(row));
        if max > before && before > f32::NEG_INFINITY {
            let shrink = ((before - max) * factor).exp2();
            state.sum *= shrink;
            for line in block.sums[row * PANEL..].chunks_mut(stride) {
                scale(&mut line[..PANEL], shrink);
            }
        }
        state.sum += sum;
        state.max = max;
    }

    /// Divides the sums by the sums of the powers and writes the result.
    fn write(&self, block: &QueryBlock, out: OutputTiles<T>) {
        let AttentionShape { queries, heads, depth, .. } = self.task.shape;
        let (sample, head) = (block.pair / heads, block.pair % heads);
        for (i, row) in block.rows.clone().enumerate() {
            let factor = 1.0 / block.softmax[i].sum;
            for start in (0..depth).step_by(PANEL) {
                let from = &block.sums[(start / PANEL * block.shape.rows + i) * PANEL..][..PANEL];
                let at = ((sample * queries + row) * heads + head) * depth + start;
                round_scaled(from, factor, out.line(at, PANEL.min(depth - start)));
            }
        }
    }

    /// `sums` is `[panel, rows, 32]` and decides how many panels are multiplied.
    #[expect(unsafe_code, reason = "micro-kernels take pointers")]
    fn multiply(&self, product: &ScoreProduct, sums: &mut [f32]) {
        let &ScoreProduct { shape, a, b, add } = product;
        let panel_bytes = shape.depth * PANEL * self.micro.operands.size();
        for (b, sums) in b.chunks_exact(panel_bytes).zip(sums.chunks_exact_mut(shape.rows * PANEL)) {
            for (i, first) in (0..shape.depth).step_by(shape.step).enumerate() {
                let b = b[first * PANEL * self.micro.operands.size()..].as_ptr().cast();
                let depth = shape.step.min(shape.depth - first);
                for row in (0..shape.rows).step_by(self.micro.rows) {
                    let call = TileCall {
                        a: a.rows_from(i * shape.rows + row),
                        b,
                        depth,
                        c: sums[row * PANEL..].as_mut_ptr(),
                        rows: self.micro.rows,
                        add: add || i > 0,
                    };
                    // SAFETY: operands and sums have whole tiles of rows and a depth padded to a multiple of 32.
                    unsafe { self.micro.run(&call) }
                }
            }
        }
    }

    /// Packs keys `range` as panels `[D, 32]` of 32 keys each, padded with zeros.
    fn pack_keys(&self, pair: usize, range: Range<usize>, to: &mut [MaybeUninit<u32>]) {
        let (tokens, depth) = (&self.task.k, self.task.shape.depth);
        let at = self.first_token(tokens, pair);
        let padded = depth.next_multiple_of(PANEL);
        let size = self.micro.operands.size();
        let words = padded * size / WORD;
        for (p, first) in range.clone().step_by(PANEL).enumerate() {
            let lines = PANEL.min(range.end - first);
            let start = at + first * tokens.token_stride;
            if size == size_of::<T>() {
                // The words of a panel are followed by unspecified ones, where the next panel or the values are written
                // afterwards.
                let to = &mut to[p * words * PANEL..][..(words + BLOCK) * PANEL];
                let from = Lines::of(&tokens.numbers[start..], tokens.token_stride, lines, depth);
                transpose_words(from, words, to);
                continue;
            }
            let to = &mut uninit_numbers::<f32>(to)[p * padded * PANEL..][..padded * PANEL];
            if lines < PANEL || depth < padded {
                to.fill(MaybeUninit::new(0.0));
            }
            for n in 0..lines {
                let token = &tokens.numbers[start + n * tokens.token_stride..][..depth];
                for (to, from) in to.iter_mut().skip(n).step_by(PANEL).zip(token) {
                    to.write(from.widen());
                }
            }
        }
    }

    /// Packs values `range` as panels `[keys, 32]` of 32 channels each, padded with zeros to a multiple of 32 keys.
    fn pack_values(&self, pair: usize, range: Range<usize>, to: &mut [MaybeUninit<u32>]) {
        let (tokens, depth) = (&self.task.v, self.task.shape.depth);
        let at = self.first_token(tokens, pair);
        let padded = range.len().next_multiple_of(PANEL);
        let zeros = [T::zero(); PANEL];
        for (p, channel) in (0..depth).step_by(PANEL).enumerate() {
            let columns = PANEL.min(depth - channel);
            let token = |n: usize| &tokens.numbers[at + (range.start + n) * tokens.token_stride + channel..][..columns];
            let panel = p * padded * PANEL..(p + 1) * padded * PANEL;
            if self.micro.operands == Operands::F32 {
                for (n, to) in uninit_numbers::<f32>(to)[panel].chunks_exact_mut(PANEL).enumerate() {
                    if n < range.len() {
                        widen_into(token(n), &mut to[..columns]);
                        to[columns..].fill(MaybeUninit::new(0.0));
                    } else {
                        to.fill(MaybeUninit::new(0.0));
                    }
                }
                continue;
            }
            let to = &mut uninit_numbers::<T>(to)[panel];
            if columns < PANEL || range.len() < padded {
                to.fill(MaybeUninit::new(T::zero()));
            }
            for (i, to) in to.chunks_exact_mut(2 * PANEL).take(range.len().div_ceil(2)).enumerate() {
                let odd = if 2 * i + 1 < range.len() { token(2 * i + 1) } else { &zeros[..columns] };
                interleave(token(2 * i), odd, to);
            }
        }
    }
}

multiversion! {
    fn widen_into<T>(from: &[T], to: &mut [MaybeUninit<f32>]) {
        for (to, from) in to.iter_mut().zip(from) {
            to.write(from.widen());
        }
    }

    /// Writes pairs of a number of `even` and one of `odd`. The loop over 32 pairs is compiled by itself, without a remainder.
    fn interleave<T>(even: &[T], odd: &[T], to: &mut [MaybeUninit<T>]) {
        if let (Some(even), Some(odd)) = (even.first_chunk::<32>(), odd.first_chunk::<32>()) {
            for ((to, even), odd) in to.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                *to = [MaybeUninit::new(*even), MaybeUninit::new(*odd)];
            }
        } else {
            for ((to, even), odd) in to.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                *to = [MaybeUninit::new(*even), MaybeUninit::new(*odd)];
            }
        }
    }
}
