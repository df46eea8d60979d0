//! BOFT: rotations of blocks in stages, the outputs permuted between them as in a fast Fourier transform. Liu et al. 2024,
//! <https://arxiv.org/abs/2311.06243>, section 4.
//!
//! The file's blocks are `[m, n, b, b]` with `n · b = O`. In stage `i` of `m` the outputs `2^i · b/2` apart meet in one
//! block. The strength applies to each stage: `1 + s · (R − 1)`, as in LyCORIS and ComfyUI.

use candle_core::{IndexOp, Tensor};

use crate::context::Context;
use crate::error::Result;
use crate::model::lora::formats::oft;
use crate::model::lora::formats::task::MergeTask;

/// The rotated weight, `[O, I·K·K]`.
pub(crate) fn rotate(task: &MergeTask, blocks: &Tensor, ctx: &Context) -> Result<Tensor> {
    let (outputs, rest) = task.sides()?;
    let (stages, count, side, _) = blocks.dims4()?;
    // The last stage mixes within `2^(m - 1) · b` outputs.
    let widest = u32::try_from(stages - 1).ok().and_then(|stage| 1_usize.checked_shl(stage)?.checked_mul(side));
    let fits = side % 2 == 0 && count.checked_mul(side) == Some(outputs);
    if !fits || widest.is_none_or(|widest| widest == 0 || outputs % widest != 0) {
        return Err(task.unfit("oft_blocks", blocks));
    }
    let rotations = oft::rotation_minus_identity(task, blocks, ctx)?.reshape((stages, count, side, side))?;
    let mut x = task.base.reshape((outputs, rest))?;
    for stage in 0..stages {
        let distance = (side / 2) << stage;
        let meeting = x.reshape((outputs / (2 * distance), 2, distance, rest))?.transpose(1, 2)?.contiguous()?;
        let meeting = meeting.reshape((count, side, rest))?;
        let rotated = (&meeting + (rotations.i(stage)?.matmul(&meeting)? * task.strength)?)?;
        let parted = rotated.reshape((outputs / (2 * distance), distance, 2, rest))?.transpose(1, 2)?.contiguous()?;
        x = parted.reshape((outputs, rest))?;
    }
    Ok(x)
}
