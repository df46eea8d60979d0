//! What ControlNets add to the UNet's feature maps at an evaluation.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::context::Context;
use crate::error::{Error, Result, StageContext};
use crate::inference::workers::denoise::Moment;
use crate::model::checkpoint::CheckpointKey;
use crate::model::networks::controlnet::{ControlInput, ControlNet, Hint, Residuals};
use crate::model::networks::unet::ReadText;

const STAGE: &str = "controlnet";

/// The ControlNets of a generation; what they add is summed.
#[derive(Default)]
pub struct Controls(pub Vec<Control>);

/// One network with its images: one, or several for a union.
pub struct Control {
    pub net: Arc<ControlNet>,
    /// Of its files.
    pub key: CheckpointKey,
    pub shown: Vec<Shown>,
    /// Whether it steers the prompt's pass alone, the middle more than the first feature maps.
    pub guess: bool,
}

/// An image as its network sees it.
pub struct Shown {
    /// `[1, H, W, C]`
    pub embedded: Tensor,
    pub kind: Option<usize>,
    pub weight: f64,
    /// Shares of the evaluations.
    pub start: f64,
    pub end: f64,
}

impl Shown {
    /// Its weight at an evaluation; 0 outside of its share of them, of which the whole evaluation must be part.
    fn weight(&self, now: Moment) -> f64 {
        let share = |call: usize| call as f64 / now.calls as f64;
        let kept = share(now.call) >= self.start && share(now.call + 1) <= self.end;
        if kept { self.weight } else { 0.0 }
    }
}

/// What the UNet is evaluated with.
#[derive(Clone, Copy)]
pub(crate) struct Evaluation<'a> {
    /// `[B, H, W, C]` in the compute dtype.
    pub(crate) sample: &'a Tensor,
    /// From [`Controls::read`], of `B` samples.
    pub(crate) texts: &'a [ReadText],
    /// `[B, P]`
    pub(crate) pooled: &'a Tensor,
    pub(crate) time_ids: &'a [Vec<f64>],
    /// How many samples, the first ones, are the negative prompt's.
    pub(crate) negative: usize,
    pub(crate) now: Moment,
}

impl Controls {
    /// Keys and values of the text, `[B, L, D]`, for each network.
    ///
    /// # Errors
    /// Those of [`ControlNet::read`].
    pub fn read(&self, context: &Tensor, dtype: DType, ctx: &Context) -> Result<Vec<ReadText>> {
        self.0.iter().map(|control| control.net.read(context, dtype, &|| ctx.checkpoint())).collect()
    }

    /// What is added to the UNet's feature maps; `None` where no network steers at this step.
    ///
    /// # Errors
    /// Cancellation; those of the device.
    pub(crate) fn residuals(&self, evaluation: Evaluation, ctx: &Context) -> Result<Option<Residuals>> {
        let mut sum: Option<Residuals> = None;
        for (i, control) in self.0.iter().enumerate() {
            let Some(text) = evaluation.texts.get(i) else {
                return Err(Error::bug("a ControlNet without its text"));
            };
            let Some(own) = control.residuals(text, evaluation, ctx)? else { continue };
            sum = Some(match sum {
                Some(sum) => sum.add(&own)?,
                None => own,
            });
        }
        Ok(sum)
    }
}

impl Control {
    fn residuals(&self, text: &ReadText, evaluation: Evaluation, ctx: &Context) -> Result<Option<Residuals>> {
        let Evaluation { sample, pooled, time_ids, negative, now, .. } = evaluation;
        let hint = |shown: &'_ Shown| (shown.kind, shown.weight(now));
        let weights: Vec<_> = self.shown.iter().map(hint).collect();
        if weights.iter().all(|(_, weight)| *weight == 0.0) {
            return Ok(None);
        }
        let hints: Vec<Hint> = (self.shown.iter().zip(weights))
            .map(|(shown, (kind, weight))| Hint { embedded: &shown.embedded, kind, weight })
            .collect();
        let check = || ctx.checkpoint();
        let input = ControlInput {
            sample,
            timesteps: &[now.level.timestep],
            text,
            pooled,
            time_ids,
            hints: &hints,
            guess: self.guess,
            check: &check,
        };
        if !self.guess || negative == 0 {
            return self.net.forward(input).map(Some);
        }
        let samples = sample.dims().first().copied().unwrap_or(0);
        let Some(count) = samples.checked_sub(negative).filter(|&count| count > 0) else { return Ok(None) };
        let residuals = self.net.forward(ControlInput {
            sample: &sample.narrow(0, negative, count).stage(STAGE)?,
            text: &text.rows(negative, count)?,
            pooled: &pooled.narrow(0, negative, count).stage(STAGE)?,
            time_ids: time_ids.get(negative..).unwrap_or_default(),
            ..input
        })?;
        residuals.after_zeros(negative).map(Some)
    }
}
