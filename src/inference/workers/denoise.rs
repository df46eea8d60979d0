//! Denoising: lends the UNet to a sampler as x₀(x, level), so that no sampler sees a network.

use std::cell::Cell;

use candle_core::Tensor;

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::device::interface::Dtype;
use crate::error::{Error, Result, StageContext as _};
use crate::inference::workers::controlnet::ControlNets;
use crate::inference::workers::latents::Masking;
use crate::inference::workers::network::Network;
use crate::inference::workers::prompts::{PreparePrompt, Prompts};
use crate::inference::workers::step::{EvaluationTime, StepSpan};
use crate::layers::Worker;
use crate::model::networks::unet::Unet;
use crate::noise::NoiseSource;
use crate::scheduler::plan::{Level, SamplingPlan};
use crate::scheduler::sampler::Model;
use crate::scheduler::workers::SAMPLERS;

pub struct Denoise;

pub struct DenoiseTask<'a> {
    pub unet: &'a Unet,
    pub controlnets: &'a ControlNets,
    /// Of as many images as `noise` has.
    pub prompts: &'a Prompts,
    pub prepare: &'a PreparePrompt<'a>,
    /// Position of the pass among the steps over which prompt schedules and guidance run.
    pub span: StepSpan,
    pub sampling: &'a SamplingPlan,
    /// `[B, H, W, C]`, f32: the sample at the level where the pass starts.
    pub x: Tensor,
    /// The repainted part; `None` repaints everything.
    pub masking: Option<&'a Masking>,
    /// True if another pass continues where this one ends.
    pub continues: bool,
    /// True if the roles of a step are evaluated one after another.
    pub slice: bool,
    /// One stream an image; `x` has drawn from it already.
    pub noise: &'a mut NoiseSource,
    pub placement: &'a Placement,
    /// Called after each step with the number of completed steps and the latest x₀.
    pub on_step: &'a mut dyn FnMut(usize, &Tensor) -> Result<()>,
}

impl Worker<DenoiseTask<'_>> for Denoise {
    /// `[B, H, W, C]`, f32: final latents, in the UNet's scale.
    type Output = Tensor;

    fn run(&self, task: DenoiseTask<'_>, ctx: &Context) -> Result<Tensor> {
        let DenoiseTask { unet, controlnets, prompts, sampling, x, masking, noise, placement, on_step, .. } = task;
        let sampler = SAMPLERS.get(sampling.sampler)?;
        let completed = Cell::new(0);
        let evaluation = Cell::new(0);
        let mut denoiser = |x: &Tensor, level: Level| {
            let now = EvaluationTime {
                level,
                step: completed.get(),
                steps: sampling.steps(),
                evaluation: evaluation.replace(evaluation.get() + 1),
                evaluations: sampling.evaluations(),
                span_step: task.span.before + completed.get(),
                span_steps: task.span.steps,
            };
            let network = Network {
                unet,
                controlnets,
                prompt: &*prompts.at(now.span_step, task.prepare)?,
                compute: placement.compute.tensor(),
                prediction: sampling.prediction,
                edm: sampling.edm,
                slice: task.slice,
                concat: masking.and_then(|masking| masking.concat.as_ref()),
            };
            network.denoised(x, now, ctx)
        };
        let mut report = |steps: usize, x: Tensor, x0: &Tensor| -> Result<Tensor> {
            completed.set(steps);
            on_step(steps, x0)?;
            match masking {
                Some(Masking { mask, outside: Some(outside), .. }) => {
                    let next = sampling.run.start + steps;
                    let ends = next >= sampling.run.end && !task.continues;
                    let level = sampling.trajectory.get(next).filter(|_| !ends).map(|step| step.at);
                    outside.restore(mask, &x, level)
                }
                _ => Ok(x),
            }
        };
        let latents = sampler.sample(sampling, x, &mut Model::new(&mut denoiser, &mut report, noise, ctx))?;
        check_finite(&latents, placement)?;
        Ok(latents)
    }
}

/// Refuses latents that are not finite, which would decode to a black picture.
fn check_finite(latents: &Tensor, placement: &Placement) -> Result<()> {
    let sum = latents.abs()?.sum_all()?.to_scalar::<f32>().stage("denoise")?;
    if sum.is_finite() {
        return Ok(());
    }
    let hint =
        (placement.compute == Dtype::F16).then(|| "f16 may overflow: try `\"dtype\":\"bf16\"` or `\"f32\"`".to_owned());
    Err(Error::Numerical { stage: "denoise", hint })
}
