//! (IA)³: `W · (1 + s · l)`, with one `l` per output, or per input if the file has `on_input`. Liu et al. 2022,
//! <https://arxiv.org/abs/2205.05638>, section 3.3; `l` is 0 for no change, as LyCORIS trains it.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FORMAT: AdapterFormat =
    AdapterFormat { marks: &["on_input"], bias_marks: &[], parts: &["weight", "on_input"], merge: &Ia3 };

struct Ia3;

impl Worker<MergeTask<'_>> for Ia3 {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        let (outputs, rest) = task.sides()?;
        let on_input = task.number("on_input")?.ok_or_else(|| task.misfit("`on_input` is missing"))? != 0.0;
        let (axis, side) = if on_input { (1, task.base.dim(1)?) } else { (0, outputs) };
        let weight = task.part("weight")?;
        if weight.elem_count() != side {
            return Err(task.unfit("weight", weight));
        }
        let inputs = task.base.dim(1)?;
        let shape = if axis == 1 { (1, inputs, 1) } else { (outputs, 1, 1) };
        let base = task.base.reshape((outputs, inputs, rest / inputs))?; // [O, I, K·K]
        let change = base.broadcast_mul(&(weight.reshape(shape)? * task.strength)?)?;
        Ok((base + change)?.reshape(task.base.shape())?)
    }
}
