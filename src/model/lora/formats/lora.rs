//! LoRA: `W + s · (alpha / R) · up · down`. Hu et al. 2021, <https://arxiv.org/abs/2106.09685>; `alpha` is
//! kohya's, and equals the rank if the file has none.
//!
//! On convolutions (LoCon, Yeh et al. 2023, <https://arxiv.org/abs/2309.14859>) `down` is `[R, I, K, K]` and `up`
//! `[O, R, 1, 1]`, or there is a core `mid` `[R, R, K, K]` between `[R, I, 1, 1]` and `[O, R, 1, 1]`. A bias of `up`, which
//! PEFT may train, is added to the layer's bias with the same factors.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FORMAT: AdapterFormat = AdapterFormat {
    marks: &["lora_up.weight", "lora_down.weight"],
    bias_marks: &["lora_up.bias"],
    parts: &[
        "lora_up.weight",
        "lora_down.weight",
        "lora_mid.weight",
        "lora_up.bias",
        "alpha",
        "dora_scale",
        "lora_magnitude_vector",
    ],
    merge: &Lora,
};

struct Lora;

impl Worker<MergeTask<'_>> for Lora {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        if task.tensor == "bias" {
            return bias(&task);
        }
        let (change, rank) = if task.parts.contains_key("lora_mid.weight") {
            let (up, down) = (task.matrix("lora_up.weight")?, task.matrix("lora_down.weight")?);
            task.tucker("lora_mid.weight", &up.t()?, &down)?
        } else {
            task.product("lora_up.weight", "lora_down.weight")?
        };
        task.change(&change, task.scale(rank)?)
    }
}

fn bias(task: &MergeTask) -> Result<Tensor> {
    let change = task.part("lora_up.bias")?;
    if change.dims() != task.base.dims() {
        return Err(task.unfit("lora_up.bias", change));
    }
    // Not read with `optional`, which would limit the part to the size of the bias.
    let rank = task.parts.get("lora_up.weight").and_then(|up| up.dims().get(1).copied()).filter(|rank| *rank > 0);
    let rank = rank.ok_or_else(|| task.misfit("`lora_up.weight` is missing"))?;
    Ok((task.base + (change * (task.strength * task.scale(rank)?))?)?)
}
