//! OFT: each block of outputs is rotated, `W + s · (R − 1)ᵀ · W`, then each output is rescaled if the file has `rescale`.
//! Qiu et al. 2023, <https://arxiv.org/abs/2306.07280>. With several stages of blocks the format is BOFT ([`boft`]).
//!
//! `R = (1 + Q)(1 − Q)⁻¹` (Cayley), `Q = B − Bᵀ` of the file's blocks `B`: `[n, b, b]` with `n · b = O`. If `alpha` is
//! above 0, the norm of the layer's `Q` is limited to `alpha · O`, as in kohya and LyCORIS. The strength does not apply to
//! `rescale`, as in LyCORIS.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::boft;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FORMAT: AdapterFormat =
    AdapterFormat { marks: &["oft_blocks"], bias_marks: &[], parts: &["oft_blocks", "rescale", "alpha"], merge: &Oft };

/// Widest block; blocks are solved on the host in cubic time.
const WIDEST_BLOCK: usize = 1280;

struct Oft;

impl Worker<MergeTask<'_>> for Oft {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, ctx: &Context) -> Result<Tensor> {
        let (outputs, rest) = task.sides()?;
        let blocks = task.part("oft_blocks")?;
        let new = match *blocks.dims() {
            [count, side, other] if side == other && count.checked_mul(side) == Some(outputs) => {
                let rotations = rotation_minus_identity(&task, blocks, ctx)?;
                let base = task.base.reshape((count, side, rest))?;
                let change = (rotations.transpose(1, 2)?.contiguous()?.matmul(&base)? * task.strength)?;
                (base + change)?.reshape((outputs, rest))?
            }
            [_, _, side, other] if side == other => boft::rotate(&task, blocks, ctx)?,
            _ => return Err(task.unfit("oft_blocks", blocks)),
        };
        let new = match task.optional("rescale")? {
            Some(rescale) if rescale.elem_count() == outputs => new.broadcast_mul(&rescale.reshape((outputs, 1))?)?,
            Some(rescale) => return Err(task.unfit("rescale", rescale)),
            None => new,
        };
        Ok(new.reshape(task.base.shape())?)
    }
}

/// `R − 1` of every block of `[.., b, b]`, as `[n, b, b]`.
pub(crate) fn rotation_minus_identity(task: &MergeTask, blocks: &Tensor, ctx: &Context) -> Result<Tensor> {
    let (outputs, _) = task.sides()?;
    let side = blocks.dim(candle_core::D::Minus1)?;
    if side > WIDEST_BLOCK {
        return Err(task.misfit(format!("`oft_blocks` must be at most {WIDEST_BLOCK} wide, and are {side}")));
    }
    let values = blocks.flatten_all()?.to_vec1::<f32>()?;
    let mut skew: Vec<Vec<f64>> = values.chunks(side * side).map(|block| skew(block, side)).collect();
    let limit = task.number("alpha")?.unwrap_or(0.0) * outputs as f64;
    let length = skew.iter().flatten().map(|q| q * q).sum::<f64>().sqrt();
    if limit > 0.0 && length > limit {
        skew.iter_mut().flatten().for_each(|q| *q *= limit / length);
    }
    let rotations = skew.par_iter().map(|q| {
        ctx.checkpoint()?;
        cayley_rotation_minus_identity(q, side).ok_or_else(|| task.misfit("`oft_blocks` are too large for a rotation"))
    });
    let rotations = rotations.collect::<Result<Vec<_>>>()?.concat();
    Ok(Tensor::from_vec(rotations, (values.len() / (side * side), side, side), blocks.device())?)
}

/// `B − Bᵀ`
fn skew(block: &[f32], side: usize) -> Vec<f64> {
    let transposed = (0..side).flat_map(|row| block.iter().skip(row).step_by(side));
    block.iter().zip(transposed).map(|(b, t)| f64::from(*b) - f64::from(*t)).collect()
}

/// `(1 − Q)⁻¹(1 + Q) − 1 = (1 − Q)⁻¹ · 2Q`, by elimination with the largest pivot of each column. `None` if the numbers
/// are too large; `1 − Q` of a skew `Q` is never singular.
fn cayley_rotation_minus_identity(q: &[f64], side: usize) -> Option<Vec<f32>> {
    // Rows of [1 − Q | 2Q].
    let mut rows: Vec<Vec<f64>> = q
        .chunks(side)
        .enumerate()
        .map(|(number, row)| {
            let left = row.iter().enumerate().map(|(column, q)| f64::from(u8::from(column == number)) - q);
            left.chain(row.iter().map(|q| 2.0 * q)).collect()
        })
        .collect();
    for column in 0..side {
        let size = |row: &Vec<f64>| row.get(column).map_or(0.0, |x| x.abs());
        let largest = (column..side).max_by(|a, b| {
            let of = |number: &usize| rows.get(*number).map_or(0.0, size);
            of(a).total_cmp(&of(b))
        })?;
        rows.swap(column, largest);
        let (done, below) = rows.split_at_mut(column + 1);
        let pivot = done.last()?;
        below.iter_mut().try_for_each(|row| subtract(row, pivot, column, column))?;
    }
    for column in (0..side).rev() {
        let (above, from) = rows.split_at_mut(column);
        let row = from.first_mut()?;
        let pivot = *row.get(column)?;
        row.get_mut(side..)?.iter_mut().for_each(|x| *x /= pivot);
        *row.get_mut(column)? = 1.0;
        above.iter_mut().try_for_each(|other| subtract(other, row, column, side))?;
    }
    let solved = rows.iter().flat_map(|row| row.iter().skip(side));
    solved.map(|x| Some(*x as f32).filter(|x| x.is_finite())).collect()
}

/// Subtracts the multiple of `pivot` from `row` that makes its `column` zero, from index `start` on.
fn subtract(row: &mut [f64], pivot: &[f64], column: usize, start: usize) -> Option<()> {
    let factor = row.get(column)? / pivot.get(column)?;
    if factor != 0.0 {
        row.get_mut(start..)?.iter_mut().zip(pivot.get(start..)?).for_each(|(x, p)| *x -= factor * p);
    }
    Some(())
}
