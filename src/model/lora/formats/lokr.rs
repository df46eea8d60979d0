//! LoKr: `W + s · (alpha / R) · w1 ⊗ w2`. Yeh et al. 2023 (LyCORIS), <https://arxiv.org/abs/2309.14859>, section 3.2.
//!
//! `w1` is `[O₁, I₁]` and `w2` `[O₂, I₂, K, K]`, each whole or a product of two factors, or for `w2` a core `t2` between
//! `[R, O₂]` and `[R, I₂]`. `R` is the rank of `w2`'s factors, or else of `w1`'s; if both are whole, `alpha` is ignored.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::MergeTask;

pub(crate) const FORMAT: AdapterFormat = AdapterFormat {
    marks: &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"],
    bias_marks: &[],
    parts: &[
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "alpha",
        "dora_scale",
        "lora_magnitude_vector",
    ],
    merge: &Lokr,
};

struct Lokr;

impl Worker<MergeTask<'_>> for Lokr {
    type Output = Tensor;

    /// # Errors
    /// `model_unsupported` for parts that are missing or do not fit the layer; errors of the device.
    fn run(&self, task: MergeTask, _: &Context) -> Result<Tensor> {
        let whole = |name: &str| task.parts.contains_key(name);
        let (w1, rank1) = if whole("lokr_w1") {
            (task.matrix("lokr_w1")?, None)
        } else {
            let (w1, rank) = task.product("lokr_w1_a", "lokr_w1_b")?;
            (w1, Some(rank))
        };
        let (w2, rank2) = if whole("lokr_w2") {
            (task.matrix("lokr_w2")?, None)
        } else if whole("lokr_t2") {
            let (w2, rank) = task.tucker("lokr_t2", &task.matrix("lokr_w2_a")?, &task.matrix("lokr_w2_b")?)?;
            (w2, Some(rank))
        } else {
            let (w2, rank) = task.product("lokr_w2_a", "lokr_w2_b")?;
            (w2, Some(rank))
        };
        let ((o1, i1), (o2, i2), (outputs, rest)) = (w1.dims2()?, w2.dims2()?, task.sides()?);
        if o1.checked_mul(o2) != Some(outputs) || i1.checked_mul(i2) != Some(rest) {
            return Err(task.misfit(format!("{o1}×{i1} ⊗ {o2}×{i2} does not fit {:?}", task.base.dims())));
        }
        let change = w1.reshape((o1, 1, i1, 1))?.broadcast_mul(&w2.reshape((1, o2, 1, i2))?)?; // [O₁, O₂, I₁, I₂·K·K]
        let scale = rank2.or(rank1).map_or(Ok(1.0), |rank| task.scale(rank))?;
        task.change(&change.reshape((outputs, rest))?, scale)
    }
}
