//! Matrix products in tiles. A task is a block of rows times some panels of weights: for each step of the depth the rows
//! are gathered into a block that the second cache holds, then every panel, which the first cache holds, meets all of
//! them a few at a time. What follows the product is applied to each tile while it is still at hand.
//!
//! Legend: `rows` positions, `depth` what is summed over, `outputs` columns of the result.

use std::ops::Range;

use candle_core::Result;
use half::bf16;

use crate::kernels::Activation;
use crate::kernels::cpu::element::{Element, Held};
use crate::kernels::cpu::epilogue::{Finish, Spot, Target, finish_gated, finish_tile, rescale};
use crate::kernels::cpu::micro::{self, A_BYTES, A_STRIDE, Call, Micro, Operands, PANEL};
use crate::kernels::cpu::packed::Packed;
use crate::kernels::cpu::parallel::{Scratch, Shared, for_each, threads, with_scratch};
use crate::kernels::cpu::quantize::Bytes;
use crate::kernels::cpu::simd;
use crate::kernels::cpu::streaming_pack::Panels;

/// Rows of a task, at most.
const ROWS: usize = 512;
/// Panels of a task, at most: the more, the fewer times rows are gathered; their sums overflow the second cache, but are
/// read no more than once for each step of the depth.
const PANELS: usize = 20;
/// f32 numbers summed in one chain: several short chains lose fewer digits than a long one, and at this length no more
/// than torch's products and convolutions do. bf16 has lost them already.
const CHAIN: usize = 128;
/// Multiplications worth a task of their own.
const TASK: usize = 1 << 19;

/// Rows of a task's block, [`A_STRIDE`] bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    start: *mut u8,
    operands: Operands,
}

impl Block {
    /// # Safety
    /// Rows that are written are there, and nothing else uses them meanwhile.
    #[expect(unsafe_code, reason = "a block of bytes seen as rows of numbers")]
    pub(crate) unsafe fn new(start: *mut u8, operands: Operands) -> Self {
        Self { start, operands }
    }

    /// Writes `from` to `row`, from number `column` on.
    #[expect(unsafe_code, reason = "a block of bytes seen as rows of numbers")]
    #[inline]
    pub(crate) fn put<T: Element>(self, row: usize, column: usize, from: &[T]) {
        let to = self.start.wrapping_add(row * A_STRIDE + column * self.operands.size());
        debug_assert!((column + from.len()) * self.operands.size() <= A_STRIDE, "a row too long");
        // SAFETY: the row is there; micro-kernels of bf16 operands are only chosen where the activations are bf16, those of
        // bytes where they are bytes.
        unsafe {
            match self.operands {
                Operands::F32 => simd::widen_slice(from, std::slice::from_raw_parts_mut(to.cast::<f32>(), from.len())),
                Operands::Bf16 => {
                    std::ptr::copy_nonoverlapping(from.as_ptr().cast::<bf16>(), to.cast::<bf16>(), from.len());
                }
                Operands::I8 | Operands::U8 => {
                    std::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to, from.len());
                }
            }
        }
    }

    /// Writes `count` zeros.
    #[expect(unsafe_code, reason = "a block of bytes seen as rows of numbers")]
    #[inline]
    pub(crate) fn clear(self, row: usize, column: usize, count: usize) {
        let size = self.operands.size();
        let to = self.start.wrapping_add(row * A_STRIDE + column * size);
        debug_assert!((column + count) * size <= A_STRIDE, "a row too long");
        // SAFETY: the row is there; these bytes are a zero.
        unsafe { to.write_bytes(self.operands.zero(), count * size) }
    }
}

/// The left operand.
pub(crate) trait Rows: Sync {
    /// Writes rows `rows` between `depth` to the first rows of `block`.
    fn fill(&self, rows: Range<usize>, depth: Range<usize>, block: Block);
}

/// A matrix `[rows, depth]`.
pub(crate) struct Dense<'a, T> {
    pub(crate) numbers: &'a [T],
    pub(crate) depth: usize,
}

impl<T: Element> Rows for Dense<'_, T> {
    fn fill(&self, rows: Range<usize>, depth: Range<usize>, block: Block) {
        /// Rows that are on their way from memory meanwhile: they lie so far apart that the processor foresees none.
        const AHEAD: usize = 6;
        for (i, row) in rows.enumerate() {
            let start = row * self.depth;
            let ahead = self.numbers.as_ptr().wrapping_add(start + AHEAD * self.depth + depth.start);
            micro::prefetch(ahead.cast(), depth.len() * size_of::<T>());
            block.put(i, 0, &self.numbers[start + depth.start..start + depth.end]);
        }
    }
}

/// What follows the product.
pub(crate) struct After<'a> {
    pub(crate) bias: Option<Held<'a>>,
    pub(crate) per_sample: Option<Held<'a>>,
    pub(crate) activation: Option<Activation>,
    /// In the dtype of the activations.
    pub(crate) residual: Option<Held<'a>>,
    /// Rows of one sample.
    pub(crate) sample: usize,
    /// The first half of the outputs is multiplied by GELU of the second. Half the outputs are a multiple of 32.
    pub(crate) gated: bool,
    /// Where the weights are bytes: what the left operand was made of.
    pub(crate) bytes: Option<&'a Bytes>,
}

struct Product<'a, R, T> {
    left: &'a R,
    weight: &'a Packed,
    /// Those of `weight`.
    panels: Panels<'a>,
    micro: Micro,
    /// Numbers of the depth that are taken at once; a multiple of 32.
    step: usize,
    /// Columns of the result.
    outputs: usize,
    gated: bool,
    bytes: Option<&'a Bytes>,
    finish: Finish<'a, T>,
}

/// `left · weightᵀ` and what follows; gives `[rows, outputs]`, where gated half as many outputs as `weight` has.
pub(crate) fn product<T: Element, R: Rows>(left: &R, weight: &Packed, rows: usize, after: &After) -> Result<Vec<T>> {
    let outputs = if after.gated { weight.outputs() / 2 } else { weight.outputs() };
    let finish = Finish {
        bias: after.bias.as_ref().map(Held::slice).transpose()?,
        per_sample: after.per_sample.as_ref().map(Held::slice).transpose()?,
        activation: after.activation,
        residual: after.residual.as_ref().map(Held::slice).transpose()?,
        sample: after.sample.max(1),
        outputs,
    };
    let micro = after.bytes.map_or_else(|| Micro::new(!T::IS_F32 && weight.is_bf16()), |bytes| bytes.micro);
    let longest = if T::IS_F32 && after.bytes.is_none() { CHAIN } else { A_BYTES / micro.operands.size() };
    let depth = weight.depth();
    let step = depth.div_ceil(depth.div_ceil(longest).max(1)).next_multiple_of(micro.grain.max(32));
    let held = weight.held();
    let panels_of = Panels::new(weight, held.as_ref())?;
    let product = Product {
        left,
        weight,
        panels: panels_of,
        micro,
        step,
        outputs,
        gated: after.gated,
        bytes: after.bytes,
        finish,
    };

    let panels = outputs.div_ceil(PANEL);
    let most = if after.gated { PANELS / 2 } else { PANELS };
    let (row_block, panel_block) = blocks((rows, depth, panels), most, micro.rows);
    let (down, across) = (rows.div_ceil(row_block), panels.div_ceil(panel_block));
    let mut out = T::unwritten(rows * outputs);
    let shared = Shared::new(&mut out);
    for_each(down * across, rows * depth * outputs, |task| {
        let (row, panel) = ((task % down) * row_block, (task / down) * panel_block);
        let rows = row..(row + row_block).min(rows);
        let panels = panel..(panel + panel_block).min(panels);
        with_scratch(|scratch| product.task(rows, panels, &shared, scratch));
    });
    Ok(out)
}

/// Rows and panels of a task, so that every thread has some and none waits long for the last.
fn blocks((rows, depth, panels): (usize, usize, usize), most: usize, at_once: usize) -> (usize, usize) {
    let threads = threads();
    let worth = (rows * depth * panels * PANEL / TASK).clamp(1, 2 * threads);
    let mut across = panels.div_ceil(most);
    let mut down = rows.div_ceil(ROWS);
    // Rows are gathered again for each part of the outputs, weights read again for each part of the rows.
    if down * across < worth && panels * PANEL > rows {
        across = worth.div_ceil(down).min(panels).max(across);
    }
    if down * across < worth {
        down = worth.div_ceil(across).min(rows.div_ceil(2 * at_once)).max(down);
    }
    if down * across < worth {
        across = worth.div_ceil(down).min(panels).max(across);
    }
    if down > 1 && across % threads != 0 {
        down = down.next_multiple_of(threads);
    } else if down == 1 {
        across = evenly(panels, across, threads);
    }
    (rows.div_ceil(down).next_multiple_of(at_once), panels.div_ceil(across).max(1))
}

/// At least `parts` parts of `panels`, of which no thread has more than need be.
fn evenly(panels: usize, parts: usize, threads: usize) -> usize {
    let longest = |parts: usize| panels.div_ceil(parts.max(1)) * parts.div_ceil(threads);
    (parts..=(parts + threads).min(panels.max(parts))).min_by_key(|parts| longest(*parts)).unwrap_or(parts)
}

impl<R: Rows, T: Element> Product<'_, R, T> {
    #[expect(unsafe_code, reason = "micro-kernels take pointers")]
    fn task(&self, rows: Range<usize>, panels: Range<usize>, out: &Shared<T>, scratch: &mut Scratch) {
        let Scratch { rows: block, panel: wide, sums, .. } = scratch;
        let at_once = self.micro.rows;
        let padded = rows.len().next_multiple_of(at_once);
        let depth = self.weight.depth();
        let lanes = if self.gated { 2 } else { 1 };
        // With one step a panel's sums are done with before the next begins.
        let kept = if depth <= self.step { 1 } else { panels.len() };
        let block = block.at_least(padded * A_STRIDE);
        let tile = padded * PANEL; // sums of one panel
        let sums = sums.at_least(kept * lanes * tile * 4).cast::<f32>();
        // SAFETY: `block` has `padded` rows.
        let to = unsafe { Block::new(block, self.micro.operands) };
        // SAFETY: the tiles of this task are its own rows and columns of the result.
        let target = unsafe { Target::new(out.at(0)) };
        self.micro.within(|| {
            let mut start = 0;
            loop {
                let end = (start + self.step).min(depth);
                let taken = (end - start).next_multiple_of(self.micro.grain);
                self.left.fill(rows.clone(), start..end, to);
                if taken > end - start {
                    (0..rows.len()).for_each(|row| to.clear(row, end - start, start + taken - end));
                }
                for (i, panel) in panels.clone().enumerate() {
                    let sums = sums.wrapping_add((i % kept) * lanes * tile);
                    let column = panel * PANEL;
                    let columns = PANEL.min(self.outputs - column);
                    // What comes after this panel is fetched meanwhile, a part with each tile.
                    let next = if i + 1 < panels.len() { (panel + 1, start) } else { (panels.start, end) };
                    let ahead = next.1..(next.1 + self.step).min(depth);
                    let tiles = rows.len().div_ceil(at_once);
                    for lane in 0..lanes {
                        let gates = lane * (self.outputs / PANEL);
                        let (panel, next_panel) = (panel + gates, next.0 + gates);
                        let mut ahead = self.panels.ahead(next_panel, ahead.clone(), tiles);
                        let b = self.panels.panel(self.micro.operands, panel, start..start + taken, wide);
                        for first in (0..rows.len()).step_by(at_once) {
                            let count = at_once.min(rows.len() - first);
                            let c = sums.wrapping_add(lane * tile + first * PANEL);
                            let a = block.wrapping_add(first * A_STRIDE);
                            ahead.fetch();
                            if start > 0 {
                                micro::prefetch(c.cast::<u8>().cast_const(), count * PANEL * 4);
                            }
                            if end == depth {
                                let spot = Spot { row: rows.start + first, rows: count, column, columns };
                                self.finish.fetch(spot, out.at(0));
                            }
                            // SAFETY: the block has `padded` rows and the sums as many of 32, both multiples of what is
                            // taken at once; the panel goes on to a multiple of 32 numbers.
                            unsafe { self.micro.run(&Call { a, b, depth: taken, c, rows: count, add: start > 0 }) }
                            if end == depth && lane + 1 == lanes {
                                let spot = Spot { row: rows.start + first, rows: count, column, columns };
                                if self.gated {
                                    let of_values = panel - self.outputs / PANEL;
                                    self.rescale(
                                        of_values,
                                        sums.wrapping_add(first * PANEL),
                                        rows.start + first,
                                        count,
                                    );
                                }
                                self.rescale(panel, c, rows.start + first, count);
                                // SAFETY: these sums have been written for all steps.
                                let tile_at = |at: *mut f32| unsafe { std::slice::from_raw_parts(at, count * PANEL) };
                                if self.gated {
                                    let value = tile_at(sums.wrapping_add(first * PANEL));
                                    finish_gated(&self.finish, value, tile_at(c), spot, target);
                                } else {
                                    finish_tile(&self.finish, tile_at(c), spot, target);
                                }
                            }
                        }
                    }
                }
                start = end;
                if start >= depth {
                    break;
                }
            }
        });
    }

    /// Makes numbers of a tile of sums of bytes in place; nothing where they are numbers already.
    #[expect(unsafe_code, reason = "sums are behind a pointer")]
    fn rescale(&self, panel: usize, sums: *mut f32, row: usize, count: usize) {
        if let (Some(bytes), Some((scales, offsets))) = (self.bytes, self.weight.quantized(panel)) {
            // SAFETY: these sums have been written for all steps, and nothing else borrows them.
            let tile = unsafe { std::slice::from_raw_parts_mut(sums, count * PANEL) };
            let unsigned = self.micro.operands == Operands::U8;
            rescale(tile, bytes, row, scales, if unsigned { offsets } else { &[0; PANEL] });
        }
    }
}
