//! LoHa: `W + s · (alpha / R) · (w1_a · w1_b) ⊙ (w2_a · w2_b)`. Hyeon-Woo et al. 2021 (FedPara),
//! <https://arxiv.org/abs/2108.06098>, proposition 1, and proposition 3 for convolutions with cores `t1` and `t2`, where
//! `w_a` is `[R, O]` and `w_b` `[R, I]`. `alpha / R` is applied once, as in LyCORIS.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FORMAT: AdapterFormat = AdapterFormat {
    marks: &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    bias_marks: &[],
    parts: &[
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "hada_t1",
        "hada_t2",
        "alpha",
        "dora_scale",
        "lora_magnitude_vector",
    ],
    merge: &Loha,
};

struct Loha;

impl Worker<MergeTask<'_>> for Loha {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        let half = |a: &str, b: &str, core: &str| {
            let cores = ["hada_t1", "hada_t2"].iter().any(|core| task.parts.contains_key(*core));
            if cores { task.tucker(core, &task.matrix(a)?, &task.matrix(b)?) } else { task.product(a, b) }
        };
        let (first, rank) = half("hada_w1_a", "hada_w1_b", "hada_t1")?;
        let (second, _) = half("hada_w2_a", "hada_w2_b", "hada_t2")?;
        if first.dims() != second.dims() {
            let message = format!("its halves have the shapes {:?} and {:?}", first.dims(), second.dims());
            return Err(task.misfit(message));
        }
        task.change(&(first * second)?, task.scale(rank)?)
    }
}
