//! The whole recipe of an image: defaults and checks first, then condition, denoise, decode, deliver.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Instant;

use candle_core::Tensor;

use super::interface::{
    BatchRequest, Estimate, GenerateRequest, Generated, GeneratedBatch, Image, Inference, Request, Response, Settings,
};
use super::plan::{GenerationPlan, Guidance, TimeIds};
use super::workers::decode::{Decode, DecodeTask};
use super::workers::denoise::{Denoise, DenoiseTask, Prepare, PrepareTask, Prompt};
use super::workers::estimate::{Appraise, AppraiseTask};
use super::workers::preview::{Preview, PreviewTask};
use crate::conditioning::instructor::{ConditioningInstructor, PromptWish};
use crate::context::{Context, Engine, Progress, Stage};
use crate::device::instructor::{DeviceInstructor, Placement};
use crate::device::interface::{Dtype, Quantization};
use crate::error::{Error, Result};
use crate::layers::Instructor;
use crate::managers::Managers;
use crate::model::checkpoint::Checkpoint;
use crate::model::instructor::ModelInstructor;
use crate::noise::{NoiseSource, RngKind};
use crate::pace::Work;
use crate::pixels::Rgb8;
use crate::postprocessing::instructor::{Delivery, PostprocessingInstructor};
use crate::postprocessing::interface::OutputWish;
use crate::postprocessing::metadata::{ImageText, Parameters};
use crate::scheduler::instructor::SchedulerInstructor;
use crate::scheduler::interface::SamplingWish;
use crate::units::ImageSize;

/// Holds the instructors it leads.
pub struct InferenceInstructor {
    pub settings: Settings,
    pub device: DeviceInstructor,
    pub scheduler: SchedulerInstructor,
    pub model: ModelInstructor,
    pub conditioning: ConditioningInstructor,
    pub postprocessing: PostprocessingInstructor,
}

/// Steps where a request names none.
const STEPS: i64 = 25;
/// Guidance where a request names none.
const CFG_SCALE: f64 = 5.0;
/// The refiner's aesthetic scores of a positive and a negative prompt.
const AESTHETIC: [f64; 2] = [6.0, 2.5];

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

    /// Decides everything that `request` leaves open.
    ///
    /// # Errors
    /// A value that cannot be used, or a model that cannot be found.
    pub fn plan(&self, request: &GenerateRequest, crew: &mut Managers) -> Result<GenerationPlan> {
        let prompt = request
            .prompt
            .clone()
            .ok_or_else(|| Error::invalid("prompt", "is missing: say what the image shall show"))?;
        let checkpoint = crew.model().catalog.resolve(request.model.as_deref())?;
        let size = self.size(request, &checkpoint)?;
        let guidance = Guidance {
            scale: within("cfg_scale", request.cfg_scale.unwrap_or(CFG_SCALE), 0.0, 100.0)?,
            rescale: within("guidance_rescale", request.guidance_rescale.unwrap_or(0.0), 0.0, 1.0)?,
        };
        let sampling = self.scheduler.plan(
            &SamplingWish {
                sampler_name: request.sampler_name.clone(),
                scheduler: request.scheduler.clone(),
                steps: request
                    .steps
                    .or(Some(STEPS))
                    .filter(|_| request.sigmas.is_none() && request.timesteps.is_none()),
                eta: request.eta,
                sigmas: request.sigmas.clone(),
                timesteps: request.timesteps.clone(),
                prediction_type: request.prediction_type,
                zero_terminal_snr: request.zero_terminal_snr,
            },
            &checkpoint.scheduler,
        )?;
        let clip_skip = match request.clip_skip.unwrap_or(0) {
            skip @ 0..=64 => u32::try_from(skip).ok(),
            other => return Err(Error::invalid("clip_skip", format!("must be 0 to 64, got {other}"))),
        };
        let seeds = self.seeds(request)?;
        let time_ids = time_ids(request, size, &checkpoint)?;
        let output = self.postprocessing.resolve(&request.output.clone().unwrap_or_default())?;
        let rng = request.rng.unwrap_or_default();
        let parameters = GenerateRequest {
            prompt: Some(prompt.clone()),
            steps: Some(sampling.steps() as i64),
            cfg_scale: Some(guidance.scale),
            guidance_rescale: Some(guidance.rescale),
            sampler_name: Some(sampling.sampler.to_owned()),
            scheduler: Some(sampling.schedule.to_owned()),
            eta: Some(sampling.eta),
            seed: seeds.first().and_then(|&seed| i64::try_from(seed).ok()),
            rng: Some(rng),
            width: Some(size.width as i64),
            height: Some(size.height as i64),
            batch_size: Some(seeds.len() as i64),
            clip_skip: clip_skip.map(i64::from),
            model: Some(checkpoint.name.clone()),
            // A file of this name will be there by then, and is never overwritten.
            output: request.output.clone().map(|output| OutputWish { path: None, name: None, ..output }),
            ..request.clone()
        };
        let prompt = PromptWish {
            prompt,
            prompt_2: request.prompt_2.clone(),
            negative_prompt: request.negative_prompt.clone(),
            negative_prompt_2: request.negative_prompt_2.clone(),
            clip_skip,
            guided: guidance.is_on(),
        };
        Ok(GenerationPlan {
            checkpoint,
            dtype: request.dtype,
            quantization: request.quantization,
            prompt,
            size,
            seeds,
            rng,
            guidance,
            sampling,
            time_ids,
            output,
            parameters,
        })
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

    fn size(&self, request: &GenerateRequest, checkpoint: &Checkpoint) -> Result<ImageSize> {
        let max = i64::from(self.settings.max_side);
        let default = checkpoint.default_size();
        let side = |field: &str, wish: Option<i64>, default: usize| -> Result<usize> {
            let side = wish.unwrap_or(default as i64);
            match usize::try_from(side) {
                Ok(pixels) if side % 8 == 0 && (64..=max).contains(&side) => Ok(pixels),
                _ => Err(Error::invalid(field, format!("must be a multiple of 8 from 64 to {max}, got {side}"))),
            }
        };
        Ok(ImageSize {
            width: side("width", request.width, default.width)?,
            height: side("height", request.height, default.height)?,
        })
    }

    fn seeds(&self, request: &GenerateRequest) -> Result<Vec<u64>> {
        let count = request.batch_size.unwrap_or(i64::from(self.settings.batch_size));
        let limit = i64::from(self.settings.max_batch_size);
        if !(1..=limit).contains(&count) {
            return Err(Error::invalid("batch_size", format!("must be 1 to {limit}, got {count}")));
        }
        let first = match request.seed {
            None | Some(-1) => RandomState::new().build_hasher().finish() & 0xffff_ffff,
            Some(seed) => u64::try_from(seed)
                .map_err(|_| Error::invalid("seed", format!("must be -1 or 0 to 2⁶³-1, got {seed}")))?,
        };
        let last = first + count.unsigned_abs() - 1;
        if i64::try_from(last).is_err() {
            return Err(Error::invalid("seed", format!("must leave room for {count} images below 2⁶³, got {first}")));
        }
        Ok((first..=last).collect())
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
            ctx.progress(Progress::Image { index, path: delivered.path.clone(), seed });
            images.push(Image {
                path: delivered.path,
                base64: delivered.base64,
                format: plan.output.format.name,
                seed,
                width: plan.size.width,
                height: plan.size.height,
            });
        }
        let model = plan.checkpoint.name.clone();
        Ok(Generated { images, model, parameters: Box::new(plan.parameters) })
    }

    /// Final latents of the image with `seed`: `[1, H/8, W/8, C]`, f32, in the VAE's scale.
    ///
    /// # Errors
    /// Loading's and the networks' own, `cancelled`, `deadline_exceeded`, `numerical_error`.
    pub fn latents(
        &self,
        plan: &GenerationPlan,
        seed: u64,
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
        seed: u64,
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
        let mut noise = NoiseSource::new(plan.rng, &[seed], channels, height, width, &placement.device);
        let total = plan.sampling.steps();
        let mut observe = |done: usize, x0: &Tensor| -> Result<()> {
            ctx.progress(Progress::Step { stage: Stage::Denoise, done, total });
            match &preview {
                Some((wish, vae)) if done.is_multiple_of(wish.every) && done < total => {
                    let small = ctx.perform(
                        &Preview,
                        PreviewTask {
                            decoder: &vae.decoder,
                            config: &checkpoint.vae,
                            x0,
                            max_side: wish.max_side,
                            placement,
                        },
                    )?;
                    let png = self.postprocessing.preview(&small, ctx)?.into();
                    ctx.progress(Progress::Preview { step: done, png });
                    Ok(())
                }
                _ => Ok(()),
            }
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
                        guidance: plan.guidance,
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
        let passes = if plan.guidance.is_on() { 2 } else { 1 };
        let units = plan.sampling.evaluations() * passes * height * width;
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
    fn text(plan: &GenerationPlan, seed: u64) -> Result<ImageText> {
        let request = GenerateRequest {
            seed: i64::try_from(seed).ok(),
            batch_size: Some(1),
            output: None,
            ..plan.parameters.clone()
        };
        let mut more = Vec::new();
        if plan.guidance.rescale > 0.0 {
            more.push(("CFG Rescale", plan.guidance.rescale.to_string()));
        }
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
            seed,
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

/// The size conditioning. Diffusers' rule: the negative pass has the positive one's unless it is given its own, and
/// then its crop is 0, 0 where none is given.
fn time_ids(request: &GenerateRequest, size: ImageSize, checkpoint: &Checkpoint) -> Result<TimeIds> {
    let image = [size.height as f64, size.width as f64];
    let pair = |field: &str, wish: Option<[i64; 2]>, default: [f64; 2]| -> Result<[f64; 2]> {
        let Some(given) = wish else { return Ok(default) };
        if given.iter().any(|side| !(0..=65536).contains(side)) {
            return Err(Error::invalid(field, format!("must be two numbers of 0 to 65536, got {given:?}")));
        }
        Ok(given.map(|side| side as f64))
    };
    let original = pair("original_size", request.original_size, image)?;
    let crop = pair("crops_coords_top_left", request.crops_coords_top_left, [0.0; 2])?;
    let target = pair("target_size", request.target_size, image)?;
    let own = request.negative_original_size.is_some()
        || request.negative_crops_coords_top_left.is_some()
        || request.negative_target_size.is_some();
    let negative_original = pair("negative_original_size", request.negative_original_size, original)?;
    let negative_crop = pair(
        "negative_crops_coords_top_left",
        request.negative_crops_coords_top_left,
        if own { [0.0; 2] } else { crop },
    )?;
    let negative_target = pair("negative_target_size", request.negative_target_size, target)?;
    let ids = |original: [f64; 2], crop: [f64; 2], target: [f64; 2], aesthetic: f64| -> Vec<f64> {
        if wants_aesthetic_score(checkpoint) {
            vec![original[0], original[1], crop[0], crop[1], aesthetic]
        } else {
            [original, crop, target].concat()
        }
    };
    Ok(TimeIds {
        positive: ids(original, crop, target, AESTHETIC[0]),
        negative: ids(negative_original, negative_crop, negative_target, AESTHETIC[1]),
    })
}

fn within(field: &str, value: f64, low: f64, high: f64) -> Result<f64> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(field, format!("must be {low} to {high}, got {value}")))
}

/// The refiner's UNet has room for five numbers beside the pooled text, the base's for six.
fn wants_aesthetic_score(checkpoint: &Checkpoint) -> bool {
    checkpoint.text_encoder_2.projection_dim.and_then(|pooled| checkpoint.unet.time_ids(pooled)) == Some(5)
}
