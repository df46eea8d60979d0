//! Full differences: `W + s · diff` and `b + s · diff_b`. LyCORIS's format for norms is the same under other names.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FULL: AdapterFormat = AdapterFormat {
    marks: &["diff"],
    bias_marks: &["diff_b"],
    parts: &["diff", "diff_b"],
    merge: &Added { weight: "diff", bias: "diff_b" },
};

pub(crate) const NORM: AdapterFormat = AdapterFormat {
    marks: &["w_norm"],
    bias_marks: &["b_norm"],
    parts: &["w_norm", "b_norm"],
    merge: &Added { weight: "w_norm", bias: "b_norm" },
};

struct Added {
    weight: &'static str,
    bias: &'static str,
}

impl Worker<MergeTask<'_>> for Added {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        let name = if task.tensor == "bias" { self.bias } else { self.weight };
        let part = task.part(name)?;
        // The writer of the file may store a linear layer as a 1×1 convolution, and the other way round.
        let trimmed = |dims: &[usize]| {
            let axes = dims.iter().rposition(|&side| side != 1).map_or(0, |last| last + 1);
            dims.iter().take(axes).copied().collect::<Vec<_>>()
        };
        if trimmed(part.dims()) != trimmed(task.base.dims()) {
            return Err(task.unfit(name, part));
        }
        Ok((task.base + (part.reshape(task.base.shape())? * task.strength)?)?)
    }
}
