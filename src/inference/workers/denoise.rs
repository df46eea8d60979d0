//! Denoising: lends the UNet to a sampler as x₀(x, level). Input scaling, prediction type and guidance are applied
//! here, so that every sampler has them and none sees a network.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::conditioning::image_adapters::Adaptation;
use crate::conditioning::instructor::Conditioning;
use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::{Error, Result, StageContext as _};
use crate::inference::plan::TimeIds;
use crate::inference::plan::guidance::{Guidance, Role};
use crate::inference::workers::adapters::{Adapters, ReadAdapters, ReadAdaptersTask};
use crate::inference::workers::control::{Controls, Evaluation};
use crate::inference::workers::guidance::{ApplyGuidance, GuidanceTask};
use crate::inference::workers::latents::Masking;
use crate::inference::workers::prompts::{PreparePrompt, Prompts};
use crate::layers::Worker;
use crate::model::networks::interventions::{Perturbed, Steering};
use crate::model::networks::unet::{ReadText, Text, Unet, UnetInput};
use crate::noise::NoiseSource;
use crate::scheduler::config::Prediction;
use crate::scheduler::edm::{Edm, Preconditioning};
use crate::scheduler::plan::{Level, SamplingPlan};
use crate::scheduler::sampler::Model;
use crate::scheduler::workers::SAMPLERS;

pub struct Denoise;

pub struct DenoiseTask<'a> {
    pub unet: &'a Unet,
    pub controls: &'a Controls,
    /// Of as many images as `noise` has.
    pub prompts: &'a Prompts,
    pub prepare: &'a PreparePrompt<'a>,
    /// Steps of the pass that earlier runs have walked.
    pub before: usize,
    /// Steps of the whole pass, of which prompts and guidance count shares.
    pub pass: usize,
    pub sampling: &'a SamplingPlan,
    /// `[B, H, W, C]`, f32: the sample at the level where the run starts.
    pub x: Tensor,
    /// What is repainted; all of it where there is none.
    pub masking: Option<&'a Masking>,
    /// Whether another run goes on from where this one ends.
    pub goes_on: bool,
    /// Whether the passes of a step are made one after another.
    pub slice: bool,
    /// The images' own streams, after what `x` was made of.
    pub noise: &'a mut NoiseSource,
    pub placement: &'a Placement,
    /// Told after each step how many are done, and the latest x₀.
    pub observe: &'a mut dyn FnMut(usize, &Tensor) -> Result<()>,
}

impl Worker<DenoiseTask<'_>> for Denoise {
    /// `[B, H, W, C]`, f32: final latents, still in the VAE's scale.
    type Output = Tensor;

    fn run(&self, task: DenoiseTask<'_>, ctx: &Context) -> Result<Tensor> {
        let DenoiseTask {
            unet,
            controls,
            prompts,
            prepare,
            before,
            pass,
            sampling,
            x,
            masking,
            goes_on,
            slice,
            noise,
            placement,
            observe,
        } = task;
        let sampler = SAMPLERS.get(sampling.sampler)?;
        let done = Cell::new(0);
        let steps = sampling.steps();
        let (called, calls) = (Cell::new(0), sampling.evaluations());
        let mut denoiser = |x: &Tensor, level: Level| {
            let call = called.replace(called.get() + 1);
            let now = Moment { level, step: done.get(), steps, call, calls, pass: (before + done.get(), pass) };
            let network = Network {
                unet,
                controls,
                prompt: &*prompts.at(now.pass.0, prepare)?,
                compute: placement.compute.tensor(),
                prediction: sampling.prediction,
                edm: sampling.edm,
                slice,
                beside: masking.and_then(|masking| masking.beside.as_ref()),
            };
            network.denoised(x, now, ctx)
        };
        let mut on_step = |completed_steps: usize, x: Tensor, x0: &Tensor| -> Result<Tensor> {
            done.set(completed_steps);
            observe(completed_steps, x0)?;
            match masking {
                Some(Masking { mask, outside: Some(outside), .. }) => {
                    outside.hold(mask, &x, (sampling, completed_steps), goes_on)
                }
                _ => Ok(x),
            }
        };
        let latents = sampler.sample(sampling, x, &mut Model::new(&mut denoiser, &mut on_step, noise, ctx))?;
        finite(&latents, placement)?;
        Ok(latents)
    }
}

/// Makes what of a prompt stays the same from step to step and from image to image.
pub struct Prepare;

pub struct PrepareTask<'a> {
    pub unet: &'a Unet,
    pub controls: &'a Controls,
    pub adaptation: &'a Adaptation,
    pub conditioning: &'a Conditioning,
    pub time_ids: &'a TimeIds,
    pub guidance: &'a Guidance,
    pub placement: &'a Placement,
    /// `B`: images made at once, all with this prompt.
    pub batch: usize,
}

/// A prompt as the UNet takes it, for every pass that some step needs. The passes of a step are evaluated in one batch.
pub struct Prompt {
    roles: Vec<Role>,
    text: ReadText,
    /// For each ControlNet.
    control_texts: Vec<ReadText>,
    adapters: Adapters,
    /// The weight of each part.
    parts: Vec<f64>,
    /// `[passes·B, P]`
    pooled: Tensor,
    /// One row a sample.
    time_ids: Vec<Vec<f64>>,
    guidance: Guidance,
    batch: usize,
}

impl Worker<PrepareTask<'_>> for Prepare {
    type Output = Prompt;

    fn run(&self, task: PrepareTask<'_>, ctx: &Context) -> Result<Prompt> {
        let PrepareTask { unet, controls, adaptation, conditioning, time_ids, guidance, placement, batch } = task;
        let mut contexts = Vec::new();
        let mut pooled = Vec::new();
        let mut ids = Vec::new();
        let parts: Vec<f64> = conditioning.positive.iter().map(|part| part.weight).collect();
        let roles = guidance.all_roles();
        let mut told = conditioning.positive.iter();
        for role in &roles {
            let (text, sizes) = match role {
                Role::Unseen | Role::Negative => (conditioning.negative.as_ref(), &time_ids.negative),
                Role::Positive => (told.next().map(|part| &part.embeddings), &time_ids.positive),
                Role::Perturbed | Role::Skipping => {
                    (conditioning.positive.first().map(|part| &part.embeddings), &time_ids.positive)
                }
            };
            let text = text.ok_or_else(|| Error::bug(format!("a pass without its prompt: {role:?}")))?;
            for _ in 0..batch {
                contexts.push(&text.context);
                pooled.push(&text.pooled);
                ids.push(sizes.clone());
            }
        }
        let compute = placement.compute.tensor();
        let context = Tensor::cat(&contexts, 0)?; // [passes·B, L, D]
        let text = unet.read(&context, compute, &|| ctx.checkpoint())?;
        let negatives = batch * negatives(&roles);
        let task = ReadAdaptersTask { unet, adaptation, text: &text, negatives };
        Ok(Prompt {
            roles,
            control_texts: controls.read(&context, compute, ctx)?,
            adapters: ctx.perform(&ReadAdapters, task)?,
            text,
            parts,
            pooled: Tensor::cat(&pooled, 0)?.to_dtype(compute)?,
            time_ids: ids,
            guidance: guidance.clone(),
            batch,
        })
    }
}

impl Prompt {
    /// Which samples of all those prepared have these roles, which are neighbours.
    fn samples(&self, roles: &[Role]) -> Result<Range<usize>> {
        let first = self.roles.windows(roles.len().max(1)).position(|window| window == roles);
        let first = first.ok_or_else(|| Error::bug(format!("passes {roles:?} among {:?}", self.roles)))?;
        Ok(first * self.batch..(first + roles.len()) * self.batch)
    }
}

/// When an evaluation is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) level: Level,
    /// Steps that are done, of `steps` that will be walked.
    pub(crate) step: usize,
    pub(crate) steps: usize,
    /// Evaluations that were made, of `calls` that will be: samplers of second order make two a step.
    pub(crate) call: usize,
    pub(crate) calls: usize,
    /// Steps that are done, of how many, in all runs of the pass.
    pub(crate) pass: (usize, usize),
}

impl Moment {
    /// 0 at the first step, 1 at the last.
    fn done(self) -> f64 {
        let (done, steps) = self.pass;
        done as f64 / steps.saturating_sub(1).max(1) as f64
    }
}

/// One evaluation of the network: a pass for each role, `B` samples each.
struct Passes<'a> {
    roles: &'a [Role],
    /// Which of the prompt's they are.
    samples: Range<usize>,
    /// `[passes·B, H, W, C]`, in the compute dtype.
    input: &'a Tensor,
}

/// The UNet with the prompt.
struct Network<'a> {
    unet: &'a Unet,
    controls: &'a Controls,
    prompt: &'a Prompt,
    compute: DType,
    prediction: Prediction,
    /// For a network with a preconditioning of its own.
    edm: Option<Edm>,
    slice: bool,
    /// `[B, H, W, ·]`, f32: what the UNet takes beside the latents.
    beside: Option<&'a Tensor>,
}

impl Network<'_> {
    /// x₀ for `x` at a moment: `[B, H, W, C]`, f32.
    fn denoised(&self, x: &Tensor, now: Moment, ctx: &Context) -> Result<Tensor> {
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

    /// x₀ under guidance; `x0` makes it of a prediction. `scaled` and the result are `[B, H, W, C]`, f32.
    fn guided(
        &self,
        scaled: &Tensor,
        now: Moment,
        x0: &dyn Fn(Tensor) -> Result<Tensor>,
        ctx: &Context,
    ) -> Result<Tensor> {
        let Prompt { guidance, batch, parts, .. } = self.prompt;
        let with = |beside: &Tensor| Tensor::cat(&[scaled, beside], 3)?.to_dtype(self.compute);
        let input = match self.beside {
            Some(beside) => with(beside)?,
            None => scaled.to_dtype(self.compute)?,
        };
        let roles = guidance.roles(now.pass.0, now.pass.1);
        let samples = self.prompt.samples(&roles)?;
        if roles == [Role::Positive] {
            return x0(self.predicted(&Passes { roles: &roles, samples, input: &input }, now, ctx)?);
        }
        let unseen = match self.beside.filter(|_| roles.contains(&Role::Unseen)) {
            Some(beside) => Some(with(&beside.zeros_like()?)?),
            None => None,
        };
        let seen = |role: &Role| unseen.as_ref().filter(|_| *role == Role::Unseen).unwrap_or(&input);
        let predicted = if self.slice {
            let firsts = samples.step_by(*batch);
            let alone = roles.iter().zip(firsts).map(|(role, first)| {
                let passes = Passes { roles: &[*role], samples: first..first + batch, input: seen(role) };
                ctx.checkpoint()?;
                self.predicted(&passes, now, ctx)
            });
            Tensor::cat(&alone.collect::<Result<Vec<_>>>()?, 0)?
        } else {
            let input = Tensor::cat(&roles.iter().map(seen).collect::<Vec<_>>(), 0)?;
            self.predicted(&Passes { roles: &roles, samples, input: &input }, now, ctx)?
        };
        let pass = |index: usize| -> Result<Tensor> { Ok(predicted.narrow(0, index * batch, *batch)?) };
        // An extent is one of latents, not of noise. Everything else is linear, and the same for either.
        let of_latents = guidance.thresholding.is_some();
        let kind = |predicted: Tensor| if of_latents { x0(predicted) } else { Ok(predicted) };
        let of = |role: Role| roles.iter().position(|&other| other == role).map(pass).transpose();
        let negative = of(Role::Negative)?;
        let first = roles.iter().position(|&role| role == Role::Positive);
        let first = first.ok_or_else(|| Error::bug("no pass for the prompt"))?;
        let positive = match &negative {
            Some(negative) => {
                let each = (0..parts.len()).map(|part| pass(first + part)).collect::<Result<Vec<_>>>()?;
                joined(negative, &each, parts)?
            }
            None => pass(first)?,
        };
        let heeded = guidance.heeds_negative(now.pass.0, now.pass.1);
        let task = GuidanceTask {
            // Parts that are not guided are joined as they are.
            negative: negative.filter(|_| heeded).map(kind).transpose()?,
            unseen: of(Role::Unseen)?.map(kind).transpose()?,
            positive: kind(positive)?,
            perturbed: of(Role::Perturbed)?.map(kind).transpose()?,
            skipping: of(Role::Skipping)?.map(kind).transpose()?,
            guidance,
            timestep: now.level.timestep,
            done: now.done(),
        };
        let guided = ctx.perform(&ApplyGuidance, task)?;
        if of_latents { Ok(guided) } else { x0(guided) }
    }

    /// One evaluation; the result is as large as its input, and f32.
    fn predicted(&self, passes: &Passes, now: Moment, ctx: &Context) -> Result<Tensor> {
        let Prompt { text, control_texts, adapters, pooled, time_ids, guidance, batch, roles, .. } = self.prompt;
        let samples = passes.samples.clone();
        let all = samples.len() == roles.len() * batch;
        let some: Vec<ReadText>;
        let (text, control_texts) = if all {
            (text, control_texts.as_slice())
        } else {
            let texts = [text].into_iter().chain(control_texts);
            some = texts.map(|text| text.rows(samples.start, samples.len())).collect::<Result<_>>()?;
            some.split_first().ok_or_else(|| Error::bug("no text of a prompt"))?
        };
        let changed = passes.roles.iter().enumerate().filter_map(|(index, &role)| {
            let blocks = guidance.changes(role)?.to_vec();
            Some(Perturbed { samples: index * batch..(index + 1) * batch, blocks })
        });
        let perturbed: Vec<Perturbed> = changed.collect();
        let adapted = adapters.at(now.step, now.steps, &samples)?;
        let pooled = &pooled.narrow(0, samples.start, samples.len())?;
        let time_ids = time_ids.get(samples).unwrap_or_default();
        let negative = batch * negatives(passes.roles);
        let task = Evaluation { sample: passes.input, texts: control_texts, pooled, time_ids, negative, now };
        let residuals = self.controls.residuals(task, ctx)?;
        let predicted = self.unet.forward(UnetInput {
            sample: passes.input,
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

/// How many passes are made for the negative prompt.
fn negatives(roles: &[Role]) -> usize {
    roles.iter().filter(|role| matches!(role, Role::Unseen | Role::Negative)).count()
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

/// A picture made of numbers that are not finite would be black; it is an error instead.
fn finite(latents: &Tensor, placement: &Placement) -> Result<()> {
    let sum = latents.abs()?.sum_all()?.to_scalar::<f32>().stage("denoise")?;
    if sum.is_finite() {
        return Ok(());
    }
    let hint = (placement.compute == crate::device::interface::Dtype::F16)
        .then(|| "f16 may overflow: try `\"dtype\":\"bf16\"` or `\"f32\"`".to_owned());
    Err(Error::Numerical { stage: "denoise", hint })
}

#[cfg(test)]
mod tests {
    use super::{Adaptation, Controls, DType, Guidance, Prepare, PrepareTask, Prompt, Tensor, TimeIds};
    use crate::conditioning::instructor::{Conditioning, Positive};
    use crate::context::Context;
    use crate::device::instructor::Placement;
    use crate::device::interface::{Dtype, Quantization};
    use crate::model::checkpoint::Checkpoint;
    use crate::model::instructor::ModelResources;
    use crate::model::interface::Settings;

    /// What the demonstration model is told at `scale`, of as many parts.
    fn prompt(scale: f64, batch: usize, parts: usize) -> Prompt {
        let (ctx, device) = (Context::detached(), candle_core::Device::Cpu);
        let placement = Placement {
            device: device.clone(),
            name: "cpu".to_owned(),
            compute: Dtype::F32,
            vae: Dtype::F32,
            quantization: Quantization::None,
            away: false,
        };
        let checkpoint = Checkpoint::demo().unwrap();
        let unet = ModelResources::new(&Settings::default()).unets.acquire(&checkpoint, &placement, &ctx).unwrap();
        let pooled = checkpoint.text_encoder_2.projection_dim.unwrap();
        let text = |value: f32| crate::conditioning::Embeddings {
            context: Tensor::full(value, (1, 77, checkpoint.unet.context_channels()), &device).unwrap(),
            pooled: Tensor::full(value, (1, pooled), &device).unwrap(),
        };
        let part = |i: usize| Positive { embeddings: text((1 + i) as f32), weight: 1.0 };
        let conditioning = Conditioning { positive: (0..parts).map(part).collect(), negative: Some(text(-1.0)) };
        let time_ids = TimeIds { positive: vec![1.0; 6], negative: vec![-1.0; 6] };
        let task = PrepareTask {
            unet: &unet,
            controls: &Controls::default(),
            adaptation: &Adaptation::default(),
            conditioning: &conditioning,
            time_ids: &time_ids,
            guidance: &Guidance { parts, ..Guidance::of(scale) },
            placement: &placement,
            batch,
        };
        ctx.perform(&Prepare, task).unwrap()
    }

    /// Samples of one evaluation: -1 for the negative prompt's, 1 for the prompt's, 2 for its second part's.
    fn check((scale, batch, parts): (f64, usize, usize), samples: &[f32]) {
        let Prompt { text, pooled, time_ids, .. } = prompt(scale, batch, parts);
        assert_eq!((text.samples(), pooled.dtype()), (samples.len(), DType::F32), "scale {scale}, batch {batch}");
        let firsts: Vec<f32> = pooled.to_vec2::<f32>().unwrap().iter().map(|row| row[0]).collect();
        assert_eq!(firsts, samples, "scale {scale}, batch {batch}");
        let ids: Vec<f32> = time_ids.iter().map(|row| row[0] as f32).collect();
        let signs: Vec<f32> = samples.iter().map(|sample| sample.signum()).collect();
        assert_eq!(ids, signs, "scale {scale}, batch {batch}");
    }

    #[test]
    fn guidance_evaluates_both_prompts_in_one_batch_and_no_guidance_one_alone() {
        check((5.0, 1, 1), &[-1.0, 1.0]);
        check((5.0, 2, 1), &[-1.0, -1.0, 1.0, 1.0]);
        check((1.0, 1, 1), &[1.0]);
        check((0.0, 3, 1), &[1.0, 1.0, 1.0]);
        check((5.0, 2, 2), &[-1.0, -1.0, 1.0, 1.0, 2.0, 2.0]);
        check((1.0, 1, 2), &[-1.0, 1.0, 2.0]);
    }
}
