//! Classifier-free guidance (Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>) and its rescaling (Lin et al. 2023,
//! <https://arxiv.org/abs/2305.08891>, equations 15 and 16); guidance away from perturbed passes (Ahn et al. 2024,
//! <https://arxiv.org/abs/2403.17377>, equation 16).

use candle_core::{DType, Device, Tensor};

use crate::context::Context;
use crate::error::Result;
use crate::inference::plan::guidance::Guidance;
use crate::inference::workers::thresholding::{Threshold, ThresholdTask};
use crate::layers::Worker;

/// Joins the predictions of an evaluation's passes.
pub struct ApplyGuidance;

/// Predictions are `[B, H, W, C]`, f32, all of one kind; with dynamic thresholding they are x₀.
pub struct GuidanceTask<'a> {
    /// For the negative prompt without the image, of a model that edits one.
    pub unseen: Option<Tensor>,
    /// For the negative prompt, where this step heeds it.
    pub negative: Option<Tensor>,
    /// For the prompt.
    pub positive: Tensor,
    /// For the prompt, with perturbed attention.
    pub perturbed: Option<Tensor>,
    /// For the prompt, with layers skipped.
    pub skipping: Option<Tensor>,
    pub guidance: &'a Guidance,
    pub timestep: f64,
    /// 0 at the first step, 1 at the last.
    pub done: f64,
}

impl Worker<GuidanceTask<'_>> for ApplyGuidance {
    /// `[B, H, W, C]`, f32.
    type Output = Tensor;

    fn run(&self, task: GuidanceTask<'_>, ctx: &Context) -> Result<Tensor> {
        let GuidanceTask { unseen, negative, positive, perturbed, skipping, guidance, timestep, done } = task;
        let skipped = guidance.skipped_layers.as_ref().map_or(0.0, |skipped| skipped.scale);
        let mut guided = match (&negative, &skipping, &guidance.thresholding) {
            (Some(negative), _, Some(options)) => {
                ctx.perform(&Threshold, ThresholdTask { negative, positive: &positive, done, options })?
            }
            (Some(negative), _, None) => from(negative, &positive, guidance.scale)?,
            // Diffusers' guider starts at the worse prediction where there is no other.
            (None, Some(skipping), _) => from(skipping, &positive, skipped)?,
            (None, None, _) => positive.clone(),
        };
        // u + s (p − n) + i (n − u), Brooks et al. 2022, equation 3, less what is in `guided` already.
        if let (Some(negative), Some(unseen), Some(scale)) = (&negative, &unseen, guidance.image_scale) {
            guided = (guided + ((negative - unseen)? * (scale - 1.0))?)?;
        }
        if let (Some(_), Some(skipping)) = (&negative, &skipping) {
            guided = (guided + ((&positive - skipping)? * skipped)?)?;
        }
        if let (Some(perturbed), Some(options)) = (&perturbed, &guidance.perturbed_attention) {
            guided = (guided + ((&positive - perturbed)? * options.scale_at(timestep))?)?;
        }
        if guidance.rescale == 0.0 || (negative.is_none() && skipping.is_none()) {
            return Ok(guided);
        }
        let ratio = (deviation(&positive)? / deviation(&guided)?)?; // [B, 1, 1, 1]
        let rescaled = guided.broadcast_mul(&ratio)?;
        Ok(((rescaled * guidance.rescale)? + (guided * (1.0 - guidance.rescale))?)?)
    }
}

/// From one prediction through another, `scale` times as far.
fn from(start: &Tensor, through: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((start + ((through - start)? * scale)?)?)
}

/// Standard deviation of each sample, with Bessel's correction as torch has it: `[B, 1, 1, 1]`, f32.
fn deviation(x: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    // On the host: Metal has no f64.
    let flat = x.to_device(&Device::Cpu)?.reshape((batch, height * width * channels))?.to_dtype(DType::F64)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let count = (height * width * channels).saturating_sub(1).max(1) as f64;
    let variance = (centred.sqr()?.sum_keepdim(1)? / count)?;
    Ok(variance.sqrt()?.to_dtype(DType::F32)?.reshape((batch, 1, 1, 1))?.to_device(x.device())?)
}
