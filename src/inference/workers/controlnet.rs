//! Residuals that ControlNets add to the UNet's feature maps.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::context::Context;
use crate::error::{Error, Result, StageContext};
use crate::inference::workers::step::EvaluationTime;
use crate::model::checkpoint::CheckpointKey;
use crate::model::networks::controlnet::{ControlHint, ControlInput, ControlNet, Residuals};
use crate::model::networks::unet::ReadText;

const STAGE: &str = "controlnet";

/// The ControlNets of a pass, whose residuals are summed.
#[derive(Default)]
pub struct ControlNets(pub Vec<ControlNetUnit>);

/// One network with its images: one, or several for a union.
pub struct ControlNetUnit {
    pub controlnet: Arc<ControlNet>,
    /// Key of its files.
    pub key: CheckpointKey,
    pub images: Vec<ControlImage>,
    /// True if it applies to the prompt alone, and to deep feature maps more than to shallow ones.
    pub guess_mode: bool,
}

/// An image, embedded by its network.
pub struct ControlImage {
    /// `[1, H, W, C]`
    pub embedded: Tensor,
    /// Control type, for a union.
    pub control_type: Option<usize>,
    pub weight: f64,
    /// Shares of the evaluations between which it applies.
    pub start: f64,
    pub end: f64,
}

impl ControlImage {
    /// Its weight at an evaluation; 0 unless the whole evaluation lies within its share.
    fn weight(&self, now: EvaluationTime) -> f64 {
        let share = |evaluation: usize| evaluation as f64 / now.evaluations as f64;
        let applies = share(now.evaluation) >= self.start && share(now.evaluation + 1) <= self.end;
        if applies { self.weight } else { 0.0 }
    }
}

/// Inputs that the UNet is evaluated with.
#[derive(Clone, Copy)]
pub(crate) struct Evaluation<'a> {
    /// `[B, H, W, C]` in the compute dtype.
    pub(crate) sample: &'a Tensor,
    /// From [`ControlNets::read`], of `B` samples.
    pub(crate) texts: &'a [ReadText],
    /// `[B, P]`
    pub(crate) pooled: &'a Tensor,
    pub(crate) time_ids: &'a [Vec<f64>],
    /// Number of samples of the negative prompt, which come first.
    pub(crate) negative: usize,
    pub(crate) now: EvaluationTime,
}

impl ControlNets {
    /// Keys and values of the text, `[B, L, D]`, for each network.
    ///
    /// # Errors
    /// Those of [`ControlNet::read`].
    pub fn read(&self, context: &Tensor, dtype: DType, ctx: &Context) -> Result<Vec<ReadText>> {
        self.0.iter().map(|unit| unit.controlnet.read(context, dtype, &|| ctx.checkpoint())).collect()
    }

    /// The sum of all residuals; `None` if no ControlNet applies at this evaluation.
    ///
    /// # Errors
    /// Cancellation; those of the device.
    pub(crate) fn residuals(&self, evaluation: Evaluation, ctx: &Context) -> Result<Option<Residuals>> {
        let mut sum: Option<Residuals> = None;
        for (i, unit) in self.0.iter().enumerate() {
            let Some(text) = evaluation.texts.get(i) else {
                return Err(Error::bug("a ControlNet without its text"));
            };
            let Some(own) = unit.residuals(text, evaluation, ctx)? else { continue };
            sum = Some(match sum {
                Some(sum) => sum.add(&own)?,
                None => own,
            });
        }
        Ok(sum)
    }
}

impl ControlNetUnit {
    fn residuals(&self, text: &ReadText, evaluation: Evaluation, ctx: &Context) -> Result<Option<Residuals>> {
        let Evaluation { sample, pooled, time_ids, negative, now, .. } = evaluation;
        let weights: Vec<f64> = self.images.iter().map(|image| image.weight(now)).collect();
        if weights.iter().all(|weight| *weight == 0.0) {
            return Ok(None);
        }
        let hints: Vec<ControlHint> = (self.images.iter().zip(weights))
            .map(|(image, weight)| ControlHint { embedded: &image.embedded, kind: image.control_type, weight })
            .collect();
        let check = || ctx.checkpoint();
        let input = ControlInput {
            sample,
            timesteps: &[now.level.timestep],
            text,
            pooled,
            time_ids,
            hints: &hints,
            guess: self.guess_mode,
            check: &check,
        };
        if !self.guess_mode || negative == 0 {
            return self.controlnet.forward(input).map(Some);
        }
        let samples = sample.dims().first().copied().unwrap_or(0);
        let Some(count) = samples.checked_sub(negative).filter(|&count| count > 0) else { return Ok(None) };
        let residuals = self.controlnet.forward(ControlInput {
            sample: &sample.narrow(0, negative, count).stage(STAGE)?,
            text: &text.rows(negative, count)?,
            pooled: &pooled.narrow(0, negative, count).stage(STAGE)?,
            time_ids: time_ids.get(negative..).unwrap_or_default(),
            ..input
        })?;
        residuals.after_zeros(negative).map(Some)
    }
}
