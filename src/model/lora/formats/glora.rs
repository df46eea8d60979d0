//! GLoRA: `W + s · (alpha / R) · (W · a1 · a2 + b1 · b2)`. Chavan et al. 2023, <https://arxiv.org/abs/2306.07967>, as
//! LyCORIS reduces it: `a1` is `[I, R]`, `a2` `[R, I]`, `b1` `[O, R]`, `b2` `[R, I, K, K]`.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FORMAT: AdapterFormat = AdapterFormat {
    marks: &["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    bias_marks: &[],
    parts: &["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"],
    merge: &Glora,
};

struct Glora;

impl Worker<MergeTask<'_>> for Glora {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        let (outputs, rest) = task.sides()?;
        let inputs = task.base.dim(1)?;
        let (added, rank) = task.product("b1.weight", "b2.weight")?;
        let (a1, a2) = (task.matrix("a1.weight")?, task.matrix("a2.weight")?);
        let ((rows, inner), (outer, columns)) = (a1.dims2()?, a2.dims2()?);
        if added.dims() != [outputs, rest] || rows != inputs || columns != inputs || inner != outer {
            let message = format!(
                "its change {:?} + W · {rows}×{inner} · {outer}×{columns} does not fit {:?}",
                added.dims(),
                task.base.dims()
            );
            return Err(task.misfit(message));
        }
        // The inputs last, for the products: [O·K·K, I].
        let area = rest / inputs;
        let base = task.base.reshape((outputs, inputs, area))?.transpose(1, 2)?.contiguous()?;
        let product = base.reshape((outputs * area, inputs))?.matmul(&a1)?.matmul(&a2)?;
        let product = product.reshape((outputs, area, inputs))?.transpose(1, 2)?.contiguous()?;
        task.change(&(product.reshape((outputs, rest))? + added)?, task.scale(rank)?)
    }
}
