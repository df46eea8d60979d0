//! The UNet as x₀(x, level): input scaling, prediction type, guidance, ControlNets and adapters.

use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::inference::workers::controlnet::{ControlNets, Evaluation};
use crate::inference::workers::guidance::{ApplyGuidance, GuidanceTask, Role};
use crate::inference::workers::prepare::{PreparedPrompt, negatives};
use crate::inference::workers::step::EvaluationTime;
use crate::model::networks::interventions::{Perturbed, Steering};
use crate::model::networks::unet::{ReadText, Text, Unet, UnetInput};
use crate::scheduler::config::Prediction;
use crate::scheduler::edm::{Edm, Preconditioning};
use crate::scheduler::plan::Level;

/// Samples of one evaluation: `B` for each role.
struct EvaluationBatch<'a> {
    roles: &'a [Role],
    /// Their positions in the prepared prompt.
    samples: Range<usize>,
    /// `[roles·B, H, W, C]`, in the compute dtype.
    input: &'a Tensor,
}

/// The UNet with everything that conditions it at one step.
pub(super) struct Network<'a> {
    pub(super) unet: &'a Unet,
    pub(super) controlnets: &'a ControlNets,
    pub(super) prompt: &'a PreparedPrompt,
    pub(super) compute: DType,
    pub(super) prediction: Prediction,
    /// EDM preconditioning, for networks that were trained with it.
    pub(super) edm: Option<Edm>,
    /// True if roles are evaluated one after another.
    pub(super) slice: bool,
    /// `[B, H, W, ·]`, f32: further channels of the UNet's input.
    pub(super) concat: Option<&'a Tensor>,
}

impl Network<'_> {
    /// x₀ for `x`: `[B, H, W, C]`, f32.
    pub(super) fn denoised(&self, x: &Tensor, now: EvaluationTime, ctx: &Context) -> Result<Tensor> {
        ctx.checkpoint()?;
        let Level { alpha, sigma, .. } = now.level;
        if let Some(edm) = self.edm {
            let Preconditioning { c_in, c_skip, c_out } = edm.preconditioning(sigma / alpha);
            let sign = if self.prediction == Prediction::VPrediction { -1.0 } else { 1.0 };
            let scaled = (x * (c_in / alpha))?;
            let x0 = |predicted: Tensor| Ok(((x * (c_skip / alpha))? + (predicted * (sign * c_out))?)?);
            return self.guided(&scaled, now, &x0, ctx);
        }
        // The network was trained on variance-preserving inputs: x / √(α² + σ²).
        let scale = 1.0 / alpha.hypot(sigma);
        let scaled = if scale == 1.0 { x.clone() } else { (x * scale)? };
        let x0 = |predicted: Tensor| -> Result<Tensor> {
            Ok(match self.prediction {
                // x = α x₀ + σ ε
                Prediction::Epsilon => ((x - (predicted * sigma)?)? / alpha)?,
                // v = a ε − b x₀ with a = α/√(α²+σ²), b = σ/√(α²+σ²): Salimans & Ho 2022, <https://arxiv.org/abs/2202.00512>
                Prediction::VPrediction => ((&scaled * (alpha * scale))? - (predicted * (sigma * scale))?)?,
                Prediction::Sample => predicted,
            })
        };
        self.guided(&scaled, now, &x0, ctx)
    }

    /// x₀ under guidance; `x0` computes it from a prediction. `scaled` and the result are `[B, H, W, C]`, f32.
    fn guided(
        &self,
        scaled: &Tensor,
        now: EvaluationTime,
        x0: &dyn Fn(Tensor) -> Result<Tensor>,
        ctx: &Context,
    ) -> Result<Tensor> {
        let guidance = &self.prompt.guidance;
        let roles = guidance.roles(now.span_step, now.span_steps);
        let predicted = self.predictions(scaled, &roles, now, ctx)?;
        if roles == [Role::Positive] {
            return x0(predicted);
        }
        let batch = self.prompt.batch;
        let sample = |index: usize| -> Result<Tensor> { Ok(predicted.narrow(0, index * batch, batch)?) };
        // Dynamic thresholding measures latents, not noise. All other guidance is linear, and the same for either.
        let of_latents = guidance.thresholding.is_some();
        let kind = |predicted: Tensor| if of_latents { x0(predicted) } else { Ok(predicted) };
        let of = |role: Role| roles.iter().position(|&other| other == role).map(sample).transpose();
        let negative = of(Role::Negative)?;
        let first = roles.iter().position(|&role| role == Role::Positive);
        let first = first.ok_or_else(|| Error::bug("an evaluation without the prompt"))?;
        let parts = &self.prompt.parts;
        let positive = match &negative {
            Some(negative) => {
                let each = (0..parts.len()).map(|part| sample(first + part)).collect::<Result<Vec<_>>>()?;
                joined(negative, &each, parts)?
            }
            None => sample(first)?,
        };
        let is_guided = guidance.uses_negative(now.span_step, now.span_steps);
        let task = GuidanceTask {
            // Parts that are not guided are joined as they are.
            negative: negative.filter(|_| is_guided).map(kind).transpose()?,
            unseen: of(Role::Unseen)?.map(kind).transpose()?,
            positive: kind(positive)?,
            perturbed: of(Role::Perturbed)?.map(kind).transpose()?,
            skipping: of(Role::Skipping)?.map(kind).transpose()?,
            guidance,
            timestep: now.level.timestep,
            progress: now.progress(),
        };
        let guided = ctx.perform(&ApplyGuidance, task)?;
        if of_latents { Ok(guided) } else { x0(guided) }
    }

    /// Predictions for all `roles`, in one evaluation or one after another: `[roles·B, H, W, C]`, f32.
    fn predictions(&self, scaled: &Tensor, roles: &[Role], now: EvaluationTime, ctx: &Context) -> Result<Tensor> {
        let batch = self.prompt.batch;
        let with = |concat: &Tensor| Tensor::cat(&[scaled, concat], 3)?.to_dtype(self.compute);
        let input = match self.concat {
            Some(concat) => with(concat)?,
            None => scaled.to_dtype(self.compute)?,
        };
        let samples = self.prompt.samples(roles)?;
        if let [_] = roles {
            return self.predicted(&EvaluationBatch { roles, samples, input: &input }, now, ctx);
        }
        let unseen = match self.concat.filter(|_| roles.contains(&Role::Unseen)) {
            Some(concat) => Some(with(&concat.zeros_like()?)?),
            None => None,
        };
        let input_of = |role: &Role| unseen.as_ref().filter(|_| *role == Role::Unseen).unwrap_or(&input);
        if !self.slice {
            let input = &Tensor::cat(&roles.iter().map(input_of).collect::<Vec<_>>(), 0)?;
            return self.predicted(&EvaluationBatch { roles, samples, input }, now, ctx);
        }
        let alone = roles.iter().zip(samples.step_by(batch)).map(|(role, first)| {
            ctx.checkpoint()?;
            let samples = first..first + batch;
            self.predicted(&EvaluationBatch { roles: &[*role], samples, input: input_of(role) }, now, ctx)
        });
        Ok(Tensor::cat(&alone.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// One evaluation; the result is as large as its input, and f32.
    fn predicted(&self, evaluated: &EvaluationBatch, now: EvaluationTime, ctx: &Context) -> Result<Tensor> {
        let PreparedPrompt { text, controlnet_texts, adapters, pooled, time_ids, guidance, batch, roles, .. } =
            self.prompt;
        let samples = evaluated.samples.clone();
        let all = samples.len() == roles.len() * batch;
        let some: Vec<ReadText>;
        let (text, controlnet_texts) = if all {
            (text, controlnet_texts.as_slice())
        } else {
            let texts = [text].into_iter().chain(controlnet_texts);
            some = texts.map(|text| text.rows(samples.start, samples.len())).collect::<Result<_>>()?;
            some.split_first().ok_or_else(|| Error::bug("no text of a prompt"))?
        };
        let changed = evaluated.roles.iter().enumerate().filter_map(|(index, &role)| {
            let blocks = guidance.changes(role)?.to_vec();
            Some(Perturbed { samples: index * batch..(index + 1) * batch, blocks })
        });
        let perturbed: Vec<Perturbed> = changed.collect();
        let adapted = adapters.at(now.step, now.steps, &samples)?;
        let pooled = &pooled.narrow(0, samples.start, samples.len())?;
        let time_ids = time_ids.get(samples).unwrap_or_default();
        let negative = batch * negatives(evaluated.roles);
        let task = Evaluation { sample: evaluated.input, texts: controlnet_texts, pooled, time_ids, negative, now };
        let residuals = self.controlnets.residuals(task, ctx)?;
        let predicted = self.unet.forward(UnetInput {
            sample: evaluated.input,
            timesteps: &[now.level.timestep],
            text: Text::Read(text),
            pooled,
            time_ids,
            down_residuals: residuals.as_ref().map(|residuals| residuals.down.as_slice()),
            mid_residual: residuals.as_ref().map(|residuals| &residuals.mid),
            pictures: &adapted.pictures(),
            features: &adapted.features,
            steering: Steering { perturbed: &perturbed, freeu: guidance.freeu.as_ref() },
            check: &|| ctx.checkpoint(),
        })?;
        Ok(predicted.to_dtype(DType::F32)?)
    }
}

/// The parts of a prompt as one (Liu et al. 2022, <https://arxiv.org/abs/2206.01714>, equation 11, in the web UI's form):
/// ε₋ + Σ wᵢ (εᵢ − ε₋).
fn joined(negative: &Tensor, parts: &[Tensor], weights: &[f64]) -> Result<Tensor> {
    if let ([part], [1.0]) = (parts, weights) {
        return Ok(part.clone());
    }
    let mut joined = negative.clone();
    for (part, weight) in parts.iter().zip(weights) {
        joined = (joined + ((part - negative)? * *weight)?)?;
    }
    Ok(joined)
}
