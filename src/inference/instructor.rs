//! The whole recipe of an image: defaults and checks first, then condition, denoise, decode, deliver.

use std::time::Instant;

use candle_core::Tensor;

use super::interface::{
    BatchRequest, Estimate, GenerateRequest, Generated, GeneratedBatch, Image, Inference, Request, Response, Settings,
};
use super::plan::GenerationPlan;
use super::workers::decode::{Decode, DecodeTask};
use super::workers::denoise::{Denoise, DenoiseTask, Prepare, PrepareTask, Prompt};
use super::workers::estimate::{Appraise, AppraiseTask};
use super::workers::preview::{Preview, PreviewTask};
use crate::conditioning::instructor::ConditioningInstructor;
use crate::context::{Context, Engine, Progress, Stage};
use crate::device::instructor::{DeviceInstructor, Placement};
use crate::device::interface::{Dtype, Quantization};
use crate::error::{Error, Result};
use crate::layers::Instructor;
use crate::managers::Managers;
use crate::model::checkpoint::Checkpoint;
use crate::model::instructor::ModelInstructor;
use crate::noise::{NoiseSource, RngKind, Seed, Variation};
use crate::pace::Work;
use crate::pixels::Rgb8;
use crate::postprocessing::instructor::{Delivery, PostprocessingInstructor};
use crate::postprocessing::metadata::{ImageText, Parameters};
use crate::scheduler::instructor::SchedulerInstructor;

/// Holds the instructors it leads.
pub struct InferenceInstructor {
    pub settings: Settings,
    pub device: DeviceInstructor,
    pub scheduler: SchedulerInstructor,
    pub model: ModelInstructor,
    pub conditioning: ConditioningInstructor,
    pub postprocessing: PostprocessingInstructor,
}

impl Instructor for InferenceInstructor {
    type Interface = Inference;
    type Crew = Managers;

    fn instruct(&self, request: Request, crew: &mut Managers, ctx: &Context) -> Result<Response> {
        match request {
            Request::Generate(request) | Request::Text2image(request) => {
                let plan = self.plan(&request, crew)?;
                self.generate(plan, crew, ctx).map(Response::Generated)
            }
            Request::Batch(batch) => self.batch(&batch, crew, ctx).map(Response::Batch),
        }
    }
}

impl InferenceInstructor {
    fn batch(&self, batch: &BatchRequest, crew: &mut Managers, ctx: &Context) -> Result<GeneratedBatch> {
        let limit = self.settings.max_batch_size as usize;
        if batch.requests.is_empty() || batch.requests.len() > limit {
            let got = batch.requests.len();
            return Err(Error::invalid("requests", format!("must hold 1 to {limit} generations, got {got}")));
        }
        let plans = batch
            .requests
            .iter()
            .enumerate()
            .map(|(index, request)| self.plan(request, crew).map_err(|error| error.below(&format!("requests.{index}"))))
            .collect::<Result<Vec<_>>>()?;
        let results = plans.into_iter().map(|plan| self.generate(plan, crew, ctx)).collect::<Result<Vec<_>>>()?;
        Ok(GeneratedBatch { results })
    }

    /// What the generation would need; nothing is made.
    ///
    /// # Errors
    /// Those of [`Self::plan`].
    pub fn estimate(&self, request: &GenerateRequest, crew: &mut Managers, ctx: &Context) -> Result<Response> {
        let plan = self.plan(request, crew)?;
        let compute = self.device.dtype(&crew.device, plan.dtype)?;
        let quantization = self.device.quantization(plan.quantization);
        let residents = crew.published.residents();
        let loaded = residents.iter().filter(|one| one.name == plan.checkpoint.name).map(|one| one.bytes).sum();
        let task = AppraiseTask {
            plan: &plan,
            compute,
            quantization,
            key: &pace_key(&plan.checkpoint, compute, quantization),
            pace: &crew.published.pace,
            free: self.device.free(&crew.device),
            loaded,
            decode: self.settings.decode,
        };
        ctx.perform(&Appraise, task).map(Response::Estimate)
    }

    /// Refuses what cannot fit before anything is loaded for it.
    fn check_room(&self, plan: &GenerationPlan, placement: &Placement, crew: &Managers, ctx: &Context) -> Result<()> {
        let loaded = crew.resident().iter().filter(|one| one.name == plan.checkpoint.name).map(|one| one.bytes).sum();
        let task = AppraiseTask {
            plan,
            compute: placement.compute,
            quantization: placement.quantization,
            key: &pace_key(&plan.checkpoint, placement.compute, placement.quantization),
            pace: &crew.published.pace,
            free: self.device.free(&crew.device),
            loaded,
            decode: self.settings.decode,
        };
        let Estimate { needed, activations, free: Some(free), .. } = ctx.perform(&Appraise, task)? else {
            return Ok(());
        };
        if needed <= free {
            return Ok(());
        }
        let room = free.0.saturating_sub(needed.0.saturating_sub(activations.0)) as f64;
        let shrink = (room / activations.0.max(1) as f64).sqrt();
        let fits = |side: usize| (side as f64 * shrink / 64.0) as usize * 64;
        let (width, height) = (fits(plan.size.width), fits(plan.size.height));
        let fits = (width.min(height) >= 64).then(|| format!("an image of about {width}×{height} would fit"));
        Err(Error::OutOfMemory { stage: "planning", needed, free, fits })
    }

    fn generate(&self, mut plan: GenerationPlan, crew: &mut Managers, ctx: &Context) -> Result<Generated> {
        let placement = self.device.place(&mut crew.device, plan.dtype)?.quantised(plan.quantization)?;
        ctx.computed_by(Engine {
            device: placement.name.clone(),
            dtype: placement.compute.name(),
            quantization: placement.quantization.name(),
        });
        plan.parameters.dtype = Some(placement.compute);
        plan.parameters.quantization = Some(placement.quantization);
        self.check_room(&plan, &placement, crew, ctx)?;
        let mut images = Vec::with_capacity(plan.seeds.len());
        // The same for every image of the request.
        let mut prompt = None;
        // Each image alone: it then depends on its own request only, to the last bit.
        for (index, &seed) in plan.seeds.iter().enumerate() {
            let latents = self.denoise(&plan, seed, &mut prompt, (&placement, crew, ctx))?;
            let pixels = self.pixels(&plan, &latents, &placement, crew, ctx)?;
            let delivered = ctx.stage(Stage::Write, || {
                let text = Self::text(&plan, seed)?;
                let delivery = Delivery { plan: &plan.output, image: &pixels, index, text: Some(&text) };
                self.postprocessing.deliver(delivery, ctx)
            })?;
            ctx.progress(Progress::Image { index, path: delivered.path.clone(), seed: seed.main });
            images.push(Image {
                path: delivered.path,
                base64: delivered.base64,
                format: plan.output.format.name,
                seed: seed.main,
                subseed: seed.variation.map(|variation| variation.seed),
                width: plan.size.width,
                height: plan.size.height,
            });
        }
        let model = plan.checkpoint.name.clone();
        Ok(Generated { images, model, parameters: Box::new(plan.parameters) })
    }

    /// Final latents of the image of `seed`: `[1, H/8, W/8, C]`, f32, in the VAE's scale.
    ///
    /// # Errors
    /// Loading's and the networks' own, `cancelled`, `deadline_exceeded`, `numerical_error`.
    pub fn latents(
        &self,
        plan: &GenerationPlan,
        seed: Seed,
        placement: &Placement,
        crew: &mut Managers,
        ctx: &Context,
    ) -> Result<Tensor> {
        self.denoise(plan, seed, &mut None, (placement, crew, ctx))
    }

    /// [`Self::latents`], with the `prompt` of the image before, or to be left for the next one.
    fn denoise(
        &self,
        plan: &GenerationPlan,
        seed: Seed,
        prompt: &mut Option<Prompt>,
        (placement, crew, ctx): (&Placement, &mut Managers, &Context),
    ) -> Result<Tensor> {
        let checkpoint = &plan.checkpoint;
        let conditioning = match prompt {
            Some(_) => None,
            None => {
                Some(self.conditioning.condition(&plan.prompt, checkpoint, &mut crew.conditioning, placement, ctx)?)
            }
        };
        let unet = crew.model().unets.acquire(checkpoint, placement, ctx)?;
        let preview = match ctx.preview() {
            Some(wish) => Some((wish, crew.model().vaes.acquire(checkpoint, placement, ctx)?)),
            None => None,
        };
        let (height, width) = (plan.size.height / 8, plan.size.width / 8);
        let channels = checkpoint.vae.latent_channels;
        let mut noise = NoiseSource::new(plan.rng, &[seed.main], channels, height, width, &placement.device)
            .varied(&[seed.variation]);
        let total = plan.sampling.steps();
        let mut observe = |done: usize, x0: &Tensor| -> Result<()> {
            ctx.progress(Progress::Step { stage: Stage::Denoise, done, total });
            let Some((wish, vae)) = &preview else { return Ok(()) };
            if done.is_multiple_of(wish.every) && done < total {
                let (decoder, config, max_side) = (&vae.decoder, &checkpoint.vae, wish.max_side);
                let small = ctx.perform(&Preview, PreviewTask { decoder, config, x0, max_side, placement })?;
                let png = self.postprocessing.preview(&small, ctx)?.into();
                ctx.progress(Progress::Preview { step: done, png });
            }
            Ok(())
        };
        let start = Instant::now();
        let latents = ctx.stage(Stage::Denoise, || {
            if let Some(conditioning) = &conditioning {
                *prompt = Some(ctx.perform(
                    &Prepare,
                    PrepareTask {
                        unet: &unet,
                        conditioning,
                        time_ids: &plan.time_ids,
                        guidance: &plan.guidance,
                        placement,
                        batch: 1,
                    },
                )?);
            }
            let prompt = prompt.as_ref().ok_or_else(|| Error::bug("denoising without a prompt"))?;
            ctx.perform(
                &Denoise,
                DenoiseTask {
                    unet: &unet,
                    prompt,
                    sampling: &plan.sampling,
                    noise: &mut noise,
                    placement,
                    observe: &mut observe,
                },
            )
        })?;
        let units = plan.passes() * height * width;
        let key = pace_key(checkpoint, placement.compute, placement.quantization);
        crew.published.pace.record(&key, Work::Evaluation, units, start.elapsed());
        Ok(latents)
    }

    /// The picture of `latents`.
    ///
    /// # Errors
    /// Those of [`Self::latents`].
    pub fn pixels(
        &self,
        plan: &GenerationPlan,
        latents: &Tensor,
        placement: &Placement,
        crew: &mut Managers,
        ctx: &Context,
    ) -> Result<Rgb8> {
        let vae = crew.model().vaes.acquire(&plan.checkpoint, placement, ctx)?;
        let start = Instant::now();
        let images = ctx.stage(Stage::Decode, || {
            let (decoder, config) = (&vae.decoder, &plan.checkpoint.vae);
            let (wish, free) = (self.settings.decode, self.device.free(&crew.device));
            let task = DecodeTask { decoder, config, latents, placement, wish, free };
            ctx.perform(&Decode, task)
        })?;
        let units = plan.size.width * plan.size.height / 64;
        let key = pace_key(&plan.checkpoint, placement.compute, placement.quantization);
        crew.published.pace.record(&key, Work::Decode, units, start.elapsed());
        images.into_iter().next().ok_or_else(|| Error::bug("the decoder gave no image"))
    }

    /// What the file says of itself; the request in it makes this one image.
    fn text(plan: &GenerationPlan, seed: Seed) -> Result<ImageText> {
        let request = GenerateRequest {
            seed: i64::try_from(seed.main).ok(),
            subseed: seed.variation.and_then(|variation| i64::try_from(variation.seed).ok()),
            batch_size: Some(1),
            n_iter: Some(1),
            output: None,
            ..plan.parameters.clone()
        };
        let mut more = Vec::new();
        if let Some(Variation { seed, strength }) = seed.variation {
            more.push(("Variation seed", seed.to_string()));
            more.push(("Variation seed strength", strength.to_string()));
        }
        if plan.guidance.rescale > 0.0 {
            more.push(("CFG Rescale", plan.guidance.rescale.to_string()));
        }
        more.extend(plan.guidance.text());
        if let Some(skip) = plan.prompt.clip_skip.filter(|&skip| skip > 0) {
            more.push(("Clip skip", skip.to_string()));
        }
        if plan.parameters.quantization == Some(Quantization::Int8) {
            more.push(("Quantization", Quantization::Int8.name().to_owned()));
        }
        more.push(("RNG", if plan.rng == RngKind::Nv { "NV" } else { "CPU" }.to_owned()));
        more.push(("Version", concat!("sdxl-worker ", env!("CARGO_PKG_VERSION")).to_owned()));
        let parameters = Parameters {
            prompt: &plan.prompt.prompt,
            negative_prompt: plan.prompt.negative_prompt.as_deref().unwrap_or_default(),
            steps: plan.sampling.steps(),
            sampler: plan.sampling.sampler,
            schedule: plan.sampling.schedule,
            cfg_scale: plan.guidance.scale,
            seed: seed.main,
            width: plan.size.width,
            height: plan.size.height,
            model: &plan.checkpoint.name,
            more: &more,
        };
        ImageText::new(&parameters, &request)
    }
}

/// Under which name the time of a model is remembered.
pub(super) fn pace_key(checkpoint: &Checkpoint, compute: Dtype, quantization: Quantization) -> String {
    format!("{:?} {} {}", checkpoint.key, compute.name(), quantization.name())
}
