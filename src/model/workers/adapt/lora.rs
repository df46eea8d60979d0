//! LoRA: `W + strength · (alpha / rank) · up · down`. Hu et al. 2021, <https://arxiv.org/abs/2106.09685>; `alpha` as
//! kohya's files have it, and the rank itself where they have none.

use candle_core::Tensor;

use super::{Format, MergeTask, misfit};
use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;

pub(super) const FORMAT: Format =
    Format { marks: &["lora_up.weight"], parts: &["lora_up.weight", "lora_down.weight", "alpha"], merge: &Lora };

struct Lora;

impl Worker<MergeTask<'_>> for Lora {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; those of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        let MergeTask { layer, base, parts, strength, .. } = task;
        let part = |name: &str| parts.get(name).ok_or_else(|| misfit(layer, format!("`{name}` is missing")));
        let (up, down) = (part("lora_up.weight")?, part("lora_down.weight")?);
        // [O, R] and [R, I], or [O, R, 1, 1] and [R, C, K, K]: as matrices alike.
        let (up, down) = (up.flatten_from(1)?, down.flatten_from(1)?);
        let ((outputs, rank), (inner, inputs)) = (up.dims2()?, down.dims2()?);
        if rank != inner || outputs.checked_mul(inputs) != Some(base.elem_count()) || base.dim(0)? != outputs {
            let message = format!("{outputs}×{rank} times {inner}×{inputs} does not fit {:?}", base.dims());
            return Err(misfit(layer, message));
        }
        let alpha = parts.get("alpha").map(|alpha| alpha.flatten_all()?.get(0)?.to_scalar::<f32>()).transpose()?;
        let scale = strength * alpha.map_or(1.0, |alpha| f64::from(alpha) / rank as f64);
        let change = (up.matmul(&down)? * scale)?.reshape(base.shape())?;
        Ok((base + change)?)
    }
}
