//! DoRA, over any change `Δ` of a weight: `W + s · (m · (W + Δ) / ‖W + Δ‖ − W)`. Liu et al. 2024,
//! <https://arxiv.org/abs/2402.09353>, equation 5.
//!
//! The norm is over everything that belongs to one output, or to one input, whichever `m` has a number for. At strength
//! 1 PEFT and LyCORIS agree, and ComfyUI with them where `m` is of inputs; where it is of outputs ComfyUI divides by the
//! norm of `W` alone, which is not followed here. Between 0 and 1 they differ: PEFT scales `Δ`, LyCORIS `m / ‖W + Δ‖ − 1`,
//! and ComfyUI and A1111 the whole change. This is the last, the only one that leaves `W` as it is at strength 0.

use candle_core::Tensor;

use crate::error::Result;
use crate::model::lora::formats::task::MergeTask;

/// Keeps norms from zero, as LyCORIS does: the distance from 1 to the next f32.
const EPSILON: f64 = f32::EPSILON as f64;

/// The magnitudes `m`, and whose they are.
pub(crate) enum Magnitude {
    /// `[O]`
    OfOutputs(Tensor),
    /// `[I]`
    OfInputs(Tensor),
}

/// The magnitudes that the file has for the layer. LyCORIS writes `dora_scale`, `[O, 1, ..]` or in files of its earlier
/// versions `[1, I, ..]`; PEFT writes a vector of outputs, `[O]` or for convolutions `[1, O, 1, 1]`.
pub(crate) fn magnitude(task: &MergeTask) -> Result<Option<Magnitude>> {
    let &[outputs, inputs, ..] = task.base.dims() else { return Ok(None) };
    if let Some(vector) = task.optional("lora_magnitude_vector")? {
        if vector.elem_count() != outputs {
            return Err(task.unfit("lora_magnitude_vector", vector));
        }
        return Ok(Some(Magnitude::OfOutputs(vector.flatten_all()?)));
    }
    let Some(scale) = task.optional("dora_scale")? else { return Ok(None) };
    let whose = match scale.dims() {
        [first, ..] if *first == outputs && scale.elem_count() == outputs => Magnitude::OfOutputs,
        [1, second, ..] if *second == inputs && scale.elem_count() == inputs => Magnitude::OfInputs,
        [1, second, ..] if *second == outputs && scale.elem_count() == outputs => Magnitude::OfOutputs,
        _ => return Err(task.unfit("dora_scale", scale)),
    };
    Ok(Some(whose(scale.flatten_all()?)))
}

/// `merged` is `W + Δ`.
pub(crate) fn merge(task: &MergeTask, merged: &Tensor, magnitude: &Magnitude) -> Result<Tensor> {
    let (outputs, rest) = task.sides()?;
    let inputs = merged.dim(1)?;
    let square = merged.reshape((outputs, inputs, rest / inputs))?.sqr()?; // [O, I, K·K]
    let (norm, m, shape) = match magnitude {
        Magnitude::OfOutputs(m) => (square.sum((1, 2))?, m, (outputs, 1, 1)),
        Magnitude::OfInputs(m) => (square.sum((0, 2))?, m, (1, inputs, 1)),
    };
    let factor = (m / (norm.sqrt()? + EPSILON)?)?.reshape(shape)?;
    let new = merged.reshape((outputs, inputs, rest / inputs))?.broadcast_mul(&factor)?.reshape(task.base.shape())?;
    // Two products rather than the difference of neighbours: at strength 1 nothing of W remains.
    Ok(((task.base * (1.0 - task.strength))? + (new * task.strength)?)?)
}
