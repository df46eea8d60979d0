//! DoRA, over any change `Δ` of a weight: `W + s · (m · (W + Δ) / ‖W + Δ‖ − W)`. Liu et al. 2024,
//! <https://arxiv.org/abs/2402.09353>, equation 5.
//!
//! The norm is taken over each output or over each input, depending on the shape of `m`. At strength
//! 1 PEFT and LyCORIS agree, and so does ComfyUI if `m` is per input; if it is per output, ComfyUI divides by the norm of
//! `W` alone, unlike this file. Between 0 and 1 they differ: PEFT scales `Δ`, LyCORIS `m / ‖W + Δ‖ − 1`,
//! and ComfyUI and A1111 the whole change. This is the last, the only one that leaves `W` as it is at strength 0.

use candle_core::Tensor;

use crate::error::Result;
use crate::model::lora::formats::task::MergeTask;

/// Keeps norms above zero, as in LyCORIS.
const EPSILON: f64 = f32::EPSILON as f64;

/// The magnitudes `m`, per output or per input.
pub(crate) enum Magnitude {
    /// `[O]`
    PerOutput(Tensor),
    /// `[I]`
    PerInput(Tensor),
}

/// The magnitudes of a layer, if the file has them. LyCORIS writes `dora_scale`, `[O, 1, ..]` or in files of its earlier
/// versions `[1, I, ..]`; PEFT writes one number per output, `[O]` or for convolutions `[1, O, 1, 1]`.
pub(crate) fn magnitude(task: &MergeTask) -> Result<Option<Magnitude>> {
    let &[outputs, inputs, ..] = task.base.dims() else { return Ok(None) };
    if let Some(vector) = task.optional("lora_magnitude_vector")? {
        if vector.elem_count() != outputs {
            return Err(task.unfit("lora_magnitude_vector", vector));
        }
        return Ok(Some(Magnitude::PerOutput(vector.flatten_all()?)));
    }
    let Some(scale) = task.optional("dora_scale")? else { return Ok(None) };
    let magnitude = match scale.dims() {
        [first, ..] if *first == outputs && scale.elem_count() == outputs => Magnitude::PerOutput,
        [1, second, ..] if *second == inputs && scale.elem_count() == inputs => Magnitude::PerInput,
        [1, second, ..] if *second == outputs && scale.elem_count() == outputs => Magnitude::PerOutput,
        _ => return Err(task.unfit("dora_scale", scale)),
    };
    Ok(Some(magnitude(scale.flatten_all()?)))
}

/// `merged` is `W + Δ`.
pub(crate) fn merge(task: &MergeTask, merged: &Tensor, magnitude: &Magnitude) -> Result<Tensor> {
    let (outputs, rest) = task.sides()?;
    let inputs = merged.dim(1)?;
    let square = merged.reshape((outputs, inputs, rest / inputs))?.sqr()?; // [O, I, K·K]
    let (norm, m, shape) = match magnitude {
        Magnitude::PerOutput(m) => (square.sum((1, 2))?, m, (outputs, 1, 1)),
        Magnitude::PerInput(m) => (square.sum((0, 2))?, m, (1, inputs, 1)),
    };
    let factor = (m / (norm.sqrt()? + EPSILON)?)?.reshape(shape)?;
    let new = merged.reshape((outputs, inputs, rest / inputs))?.broadcast_mul(&factor)?.reshape(task.base.shape())?;
    // Two products instead of a difference, so that at strength 1 nothing of W remains.
    Ok(((task.base * (1.0 - task.strength))? + (new * task.strength)?)?)
}
