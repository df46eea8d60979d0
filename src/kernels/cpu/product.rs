//! Matrix products in tiles: a block of rows times a block of outputs, over the depth in steps, with narrow operands
//! widened step by step and everything that follows the product applied while the tile is in the cache.
//!
//! Legend: `rows` positions, `depth` what is summed over, `outputs` columns of the result.

use std::ops::Range;

use candle_core::Result;

use super::element::{Element, Held, Numbers};
use super::pool::{Scratch, Shared, at_least, for_each, threads, with_scratch};
use super::simd;
use crate::kernels::Activation;

/// Rows of a tile.
const ROWS: usize = 384;
/// Outputs of a tile.
const OUTPUTS: usize = 960;
/// Depth of a step, where an operand has to be widened or gathered.
const DEPTH: usize = 768;
/// Depth summed in one chain: several short chains lose fewer digits than a long one, and at this length no more than
/// torch's products and convolutions do.
const CHAIN: usize = 128;
/// Weight rows widened at a time: a multiple of what the microkernels take at once.
const PANEL: usize = 192;
/// Multiplications worth a task of their own.
const TASK: usize = 1 << 19;

/// The left operand.
pub(super) trait Rows: Sync {
    /// The numbers themselves, row after row, where they are f32 and stand as they are needed.
    fn direct(&self) -> Option<&[f32]>;

    /// Writes rows `rows` between `depth` to `block`, `[rows, depth]`.
    fn fill(&self, rows: Range<usize>, depth: Range<usize>, block: &mut [f32]);
}

/// A matrix `[rows, depth]`.
pub(super) struct Dense<'a, T> {
    pub(super) numbers: &'a [T],
    pub(super) depth: usize,
}

impl<T: Element> Rows for Dense<'_, T> {
    fn direct(&self) -> Option<&[f32]> {
        as_f32(self.numbers)
    }

    fn fill(&self, rows: Range<usize>, depth: Range<usize>, block: &mut [f32]) {
        for (row, line) in rows.zip(block.chunks_exact_mut(depth.len().max(1))) {
            let start = row * self.depth;
            simd::widen_slice(&self.numbers[start + depth.start..start + depth.end], line);
        }
    }
}

#[expect(unsafe_code, reason = "a slice of T seen as what T is")]
fn as_f32<T: Element>(numbers: &[T]) -> Option<&[f32]> {
    // SAFETY: only f32 says `IS_F32`, so this is the same slice under its own type.
    T::IS_F32.then(|| unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast::<f32>(), numbers.len()) })
}

/// What follows the product.
pub(super) struct After<'a> {
    pub(super) bias: Option<Held<'a>>,
    pub(super) per_sample: Option<Held<'a>>,
    pub(super) activation: Option<Activation>,
    pub(super) residual: Option<Held<'a>>,
    /// Rows of one sample.
    pub(super) sample: usize,
    /// The first half of the outputs is multiplied by GELU of the second.
    pub(super) gated: bool,
}

/// [`After`] with its numbers at hand.
struct Finish<'a> {
    bias: Option<&'a [f32]>,
    per_sample: Option<&'a [f32]>,
    activation: Option<Activation>,
    residual: Option<Numbers<'a>>,
    sample: usize,
}

struct Product<'a, R> {
    left: &'a R,
    weight: Numbers<'a>,
    depth: usize,
    /// Columns of the result.
    outputs: usize,
    gated: bool,
    finish: Finish<'a>,
}

/// `left · weightᵀ` and what follows. `weight` is `[outputs, depth]` (twice the outputs where gated); gives
/// `[rows, outputs]`.
pub(super) fn product<T: Element, R: Rows>(
    left: &R,
    weight: &Held,
    (rows, depth, outputs): (usize, usize, usize),
    after: &After,
) -> Result<Vec<T>> {
    let finish = Finish {
        bias: after.bias.as_ref().map(Held::slice).transpose()?,
        per_sample: after.per_sample.as_ref().map(Held::slice).transpose()?,
        activation: after.activation,
        residual: after.residual.as_ref().map(Held::numbers).transpose()?,
        sample: after.sample.max(1),
    };
    let product = Product { left, weight: weight.numbers()?, depth, outputs, gated: after.gated, finish };

    let (row_block, output_block) = blocks(rows, depth, outputs);
    let (down, across) = (rows.div_ceil(row_block), outputs.div_ceil(output_block));
    let mut out = T::zeros(rows * outputs);
    let shared = Shared::new(&mut out);
    for_each(down * across, rows * depth * outputs, |task| {
        let (row, output) = ((task % down) * row_block, (task / down) * output_block);
        let rows = row..(row + row_block).min(rows);
        let columns = output..(output + output_block).min(outputs);
        with_scratch(|scratch| product.tile(rows, columns, &shared, scratch));
    });
    Ok(out)
}

/// Rows and outputs of a tile, so that every thread has some.
fn blocks(rows: usize, depth: usize, outputs: usize) -> (usize, usize) {
    let even = |count: usize, parts: usize, step: usize| count.div_ceil(parts.max(1)).next_multiple_of(step).max(1);
    let threads = threads();
    let wanted = (rows * depth * outputs / TASK).clamp(1, 4 * threads);
    let mut across = outputs.div_ceil(OUTPUTS).max(1);
    let mut down = rows.div_ceil(ROWS).max(1);
    // Rows split the gathering and widening of the left operand, outputs those of the weights: the greater work first.
    if down * across < wanted && outputs > rows {
        across = wanted.div_ceil(down).min(outputs.div_ceil(96)).max(across);
    }
    if down * across < wanted {
        down = wanted.div_ceil(across).min(rows.div_ceil(48)).max(down);
    }
    if down > 1 {
        down = down.next_multiple_of(threads).min(rows.max(1));
    }
    if down * across < wanted {
        across = wanted.div_ceil(down).min(outputs.div_ceil(48)).max(across);
    }
    (even(rows, down, 1), even(outputs, across, 16))
}

impl<R: Rows> Product<'_, R> {
    fn tile<T: Element>(&self, rows: Range<usize>, columns: Range<usize>, out: &Shared<T>, scratch: &mut Scratch) {
        let Scratch { rows: block, panel, values, .. } = scratch;
        let (count, width) = (rows.len(), columns.len());
        let in_place = T::IS_F32 && !self.gated;
        let halves = if self.gated { 2 } else { 1 };
        // Where sums are built: the result itself, or a block of f32.
        let (sums, stride) = if in_place {
            (out.at(rows.start * self.outputs + columns.start).cast::<f32>(), self.outputs)
        } else {
            (at_least(values, count * width * halves).as_mut_ptr(), width * halves)
        };

        let direct = self.left.direct();
        let narrow_weight = !matches!(self.weight, Numbers::F32(_));
        let step = if direct.is_some() && !narrow_weight {
            self.depth
        } else {
            self.depth.div_ceil(self.depth.div_ceil(DEPTH).max(1)).next_multiple_of(16).min(self.depth)
        };
        let mut start = 0;
        loop {
            let depth = start..(start + step).min(self.depth);
            let (left, left_stride) = match direct {
                Some(numbers) => (&numbers[rows.start * self.depth + depth.start..], self.depth),
                None => {
                    let block = at_least(block, count * depth.len());
                    self.left.fill(rows.clone(), depth.clone(), block);
                    (&*block, depth.len())
                }
            };
            for half in 0..halves {
                for first in (0..width).step_by(if narrow_weight { PANEL } else { width }) {
                    let panel_rows = (width - first).min(if narrow_weight { PANEL } else { width });
                    let weight_row = half * self.outputs + columns.start + first;
                    let (weight, weight_stride) =
                        self.weight_panel(weight_row..weight_row + panel_rows, depth.clone(), panel);
                    multiply(
                        Operand { start: weight.as_ptr(), lines: panel_rows, stride: weight_stride, step: 1 },
                        Operand { start: left.as_ptr(), lines: count, stride: left_stride, step: 1 },
                        depth.len(),
                        Sums { start: sums.wrapping_add(half * width + first), stride, add: start > 0, factor: 1.0 },
                    );
                }
            }
            start += step;
            if start >= self.depth {
                break;
            }
        }
        self.finish_tile(rows, columns, out, sums, stride);
    }

    /// Weight rows `rows` between `depth`, as f32, with the distance between rows.
    fn weight_panel<'s>(
        &'s self,
        rows: Range<usize>,
        depth: Range<usize>,
        panel: &'s mut Vec<f32>,
    ) -> (&'s [f32], usize) {
        if let Numbers::F32(numbers) = self.weight {
            return (&numbers[rows.start * self.depth + depth.start..], self.depth);
        }
        let panel = at_least(panel, rows.len() * depth.len());
        for (row, line) in rows.zip(panel.chunks_exact_mut(depth.len().max(1))) {
            self.weight.widen_at(row * self.depth + depth.start, line);
        }
        (panel, depth.len())
    }

    #[expect(unsafe_code, reason = "rows of a tile whose result is shared with other tiles")]
    fn finish_tile<T: Element>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &Shared<T>,
        sums: *mut f32,
        stride: usize,
    ) {
        let width = columns.len();
        let finish = &self.finish;
        let in_place = T::IS_F32 && !self.gated;
        for (i, row) in rows.enumerate() {
            let taken = if self.gated { 2 * width } else { width };
            // SAFETY: the tile's sums are `rows` lines of `taken` numbers, `stride` apart, all written by the product,
            // and no other task touches them.
            let line = unsafe { std::slice::from_raw_parts_mut(sums.wrapping_add(i * stride), taken) };
            let target = out.at(row * self.outputs + columns.start);
            if self.gated {
                let (value, gate) = line.split_at_mut(width);
                if let Some(bias) = finish.bias {
                    simd::add(value, &bias[columns.clone()]);
                    simd::add(gate, &bias[self.outputs + columns.start..self.outputs + columns.end]);
                }
                // SAFETY: row `row`, columns `columns` of the result belong to this task, and `line` is elsewhere.
                simd::gated(value, gate, unsafe { std::slice::from_raw_parts_mut(target, width) });
                continue;
            }
            if let Some(bias) = finish.bias {
                simd::add(line, &bias[columns.clone()]);
            }
            if let Some(per_sample) = finish.per_sample {
                let start = (row / finish.sample) * self.outputs;
                simd::add(line, &per_sample[start + columns.start..start + columns.end]);
            }
            if let Some(kind) = finish.activation {
                simd::activate(kind, line);
            }
            if let Some(residual) = finish.residual {
                residual.add_at(row * self.outputs + columns.start, line);
            }
            if !in_place {
                // SAFETY: as above; `line` is scratch here, never the result.
                simd::round_slice(line, unsafe { std::slice::from_raw_parts_mut(target, width) });
            }
        }
    }
}

/// `lines` vectors, `stride` apart, of numbers `step` apart.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) start: *const f32,
    pub(super) lines: usize,
    pub(super) stride: usize,
    pub(super) step: usize,
}

/// Where products go: line `n` of `b` times line `m` of `a` to `start[n · stride + m]`.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) start: *mut f32,
    pub(super) stride: usize,
    /// Add to what is there, which is not read otherwise.
    pub(super) add: bool,
    pub(super) factor: f32,
}

/// Every line of `a` times every line of `b`, on this thread. The callers' pointers cover the lines they name.
#[expect(unsafe_code, reason = "the gemm crate takes pointers")]
pub(super) fn multiply(a: Operand, b: Operand, depth: usize, sums: Sums) {
    let chain = depth.div_ceil(depth.div_ceil(CHAIN).max(1)).next_multiple_of(16).max(1);
    for start in (0..depth.max(1)).step_by(chain) {
        let depth = chain.min(depth - start);
        let add = sums.add || start > 0;
        let (a_start, b_start) = (a.start.wrapping_add(start * a.step), b.start.wrapping_add(start * b.step));
        // SAFETY: callers pass operands of `lines` lines with `depth` numbers each and sums of `b.lines` lines with
        // `a.lines` numbers each, all within their allocations; the sums overlap neither operand.
        unsafe {
            gemm::gemm(
                a.lines,
                b.lines,
                depth,
                sums.start,
                sums.stride.cast_signed(),
                1,
                add,
                a_start,
                a.step.cast_signed(),
                a.stride.cast_signed(),
                b_start,
                b.stride.cast_signed(),
                b.step.cast_signed(),
                1.0,
                sums.factor,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
