//! The whole recipe of an image: defaults and checks first, then condition, denoise, decode, deliver.

use crate::conditioning::instructor::ConditioningInstructor;
use crate::context::{Context, Engine, Progress, Stage};
use crate::device::instructor::DeviceInstructor;
use crate::device::interface::Quantization;
use crate::error::{Error, Result};
use crate::inference::interface::{
    BatchRequest, CacheUse, GenerateRequest, Generated, GeneratedBatch, Image, Inference, RefinerOptions, Request,
    Response, Settings,
};
use crate::inference::managers::memory::{MemoryPlanner, MemoryTask};
use crate::inference::plan::GenerationPlan;
use crate::inference::plan::controlnet::told;
use crate::inference::request::lora::written;
use crate::inference::workers::paste::{PasteBack, PasteTask};
use crate::layers::Instructor;
use crate::managers::Managers;
use crate::model::instructor::ModelInstructor;
use crate::noise::{RngKind, Seed, Variation};
use crate::postprocessing::instructor::{Delivery, PostprocessingInstructor};
use crate::postprocessing::metadata::{ImageText, Parameters};
use crate::scheduler::instructor::SchedulerInstructor;
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

impl Instructor for InferenceInstructor {
    type Interface = Inference;
    type Resources<'a> = &'a mut Managers;

    fn instruct(&self, request: Request, resources: &mut Managers, ctx: &Context) -> Result<Response> {
        match request {
            Request::Generate(request) => {
                let plan = self.plan(&request, resources)?;
                self.generate(plan, resources, ctx).map(Response::Generated)
            }
            Request::Text2image(request) => {
                absent(
                    "text2image",
                    &[("init_image", request.init_image.is_some()), ("mask", request.mask.is_some())],
                )?;
                let plan = self.plan(&request, resources)?;
                self.generate(plan, resources, ctx).map(Response::Generated)
            }
            Request::Img2img(request) => {
                present("img2img", "init_image", request.init_image.is_some())?;
                absent("img2img", &[("mask", request.mask.is_some())])?;
                let plan = self.plan(&request, resources)?;
                self.generate(plan, resources, ctx).map(Response::Generated)
            }
            Request::Inpaint(request) => {
                present("inpaint", "init_image", request.init_image.is_some())?;
                present("inpaint", "mask", request.mask.is_some() || request.extend.is_some())?;
                let plan = self.plan(&request, resources)?;
                self.generate(plan, resources, ctx).map(Response::Generated)
            }
            Request::Controlnet(request) => {
                let given = request.controlnet.as_ref().is_some_and(|entries| !entries.0.is_empty());
                present("controlnet", "controlnet", given)?;
                let plan = self.plan(&request, resources)?;
                self.generate(plan, resources, ctx).map(Response::Generated)
            }
            Request::Lora(request) => {
                let plan = self.plan(&request, resources)?;
                present("lora", "loras", !plan.loras.is_empty())?;
                self.generate(plan, resources, ctx).map(Response::Generated)
            }
            Request::Batch(batch) => self.batch(&batch, resources, ctx).map(Response::Batch),
        }
    }
}

impl InferenceInstructor {
    /// Estimates a generation; nothing is made.
    ///
    /// # Errors
    /// Those of [`Self::plan`] and of the files' headers.
    pub fn estimate(&self, request: &GenerateRequest, resources: &mut Managers, ctx: &Context) -> Result<Response> {
        let mut plan = self.plan(request, resources)?;
        self.memory().estimate(&mut plan, resources, ctx).map(Response::Estimate)
    }

    pub(crate) fn memory(&self) -> MemoryPlanner<'_> {
        MemoryPlanner { device: &self.device, max_side: self.settings.max_side as usize }
    }

    fn batch(&self, batch: &BatchRequest, resources: &mut Managers, ctx: &Context) -> Result<GeneratedBatch> {
        let limit = self.settings.max_batch_size as usize;
        if batch.requests.is_empty() || batch.requests.len() > limit {
            let got = batch.requests.len();
            return Err(Error::invalid("requests", format!("must hold 1 to {limit} generations, got {got}")));
        }
        let plans = batch
            .requests
            .iter()
            .enumerate()
            .map(|(index, request)| {
                self.plan(request, resources).map_err(|error| error.below(&format!("requests.{index}")))
            })
            .collect::<Result<Vec<_>>>()?;
        let results = plans.into_iter().map(|plan| self.generate(plan, resources, ctx)).collect::<Result<Vec<_>>>()?;
        Ok(GeneratedBatch { results })
    }

    fn generate(&self, mut plan: GenerationPlan, resources: &mut Managers, ctx: &Context) -> Result<Generated> {
        let mut placement = self.device.place(&mut resources.device, plan.dtype)?.quantized(plan.quantization)?;
        ctx.computed_by(Engine {
            device: placement.name.clone(),
            dtype: placement.compute.name(),
            quantization: placement.quantization.name(),
        });
        plan.parameters.dtype = Some(placement.compute);
        plan.parameters.quantization = Some(placement.quantization);
        let mut images = Vec::with_capacity(plan.seeds.len());
        let mut shared = self.shared(&plan, ctx)?;
        let memory = self.memory();
        let task = MemoryTask { plan: &mut plan, placement: &mut placement, stack: shared.stack() };
        let mut planned = memory.plan_memory(task, resources, ctx)?;
        // Each image alone: it then depends on its own request only, to the last bit.
        for (index, seed) in plan.seeds.clone().into_iter().enumerate() {
            let mut pixels = loop {
                let latents = self.draw(&plan, seed, &mut shared, (&placement, &mut *resources, ctx));
                match latents.and_then(|latents| self.pixels(&plan, &latents, &placement, resources, ctx)) {
                    Ok(pixels) => break pixels,
                    Err(error) => {
                        let task = MemoryTask { plan: &mut plan, placement: &mut placement, stack: shared.stack() };
                        memory.degrade(error, &mut planned, task, resources, ctx)?;
                    }
                }
            };
            if let Some(paste) = shared.paste() {
                pixels = ctx.perform(&PasteBack, PasteTask { painted: &pixels, paste })?;
            }
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
                width: pixels.width,
                height: pixels.height,
            });
        }
        let model = plan.checkpoint.name.clone();
        let (embeddings, cache) = shared.told();
        let cache = CacheUse { embeddings: cache, hints: shared.hints };
        let adapters = shared.adapted();
        let memory = planned.report;
        Ok(Generated { images, model, parameters: Box::new(plan.parameters), embeddings, cache, memory, adapters })
    }

    /// What the file says of itself; the request in it makes this one image.
    fn text(plan: &GenerationPlan, seed: Seed) -> Result<ImageText> {
        let request = GenerateRequest {
            seed: i64::try_from(seed.main).ok(),
            subseed: seed.variation.and_then(|variation| i64::try_from(variation.seed).ok()),
            batch_size: Some(1),
            n_iter: Some(1),
            output: None,
            // They change no pixel, and belong to the machine that made it.
            decode: None,
            slice: None,
            offload: None,
            ..plan.parameters.clone()
        }
        .without_carried_images();
        let mut more = Vec::new();
        if let Some(strength) = plan.parameters.denoising_strength {
            more.push(("Denoising strength", strength.to_string()));
        }
        if let Some(blur) = plan.parameters.mask_blur {
            more.push(("Mask blur", blur.to_string()));
        }
        if let (Some(true), Some(upscaler)) = (plan.parameters.enable_hr, &plan.parameters.hr_upscaler) {
            let ImageSize { width, height } = plan.last_size();
            more.push(("Hires resize", format!("{width}x{height}")));
            more.push(("Hires upscaler", upscaler.clone()));
        }
        if let Some(RefinerOptions { model, switch_at: Some(switch_at) }) = &plan.parameters.refiner {
            more.push(("Refiner", model.clone()));
            more.push(("Refiner switch at", switch_at.to_string()));
        }
        more.extend(plan.controls.iter().map(told));
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
            prompt: &written(&plan.prompt.prompt, &plan.loras),
            negative_prompt: plan.prompt.negative_prompt.as_deref().unwrap_or_default(),
            steps: plan.sampling.trajectory.len(),
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

/// What an operation is about must be in its request.
fn present(operation: &str, field: &str, given: bool) -> Result<()> {
    if given { Ok(()) } else { Err(Error::invalid(field, format!("is missing: `{operation}` needs it"))) }
}

/// What belongs to another operation must not be in its request.
fn absent(operation: &str, fields: &[(&str, bool)]) -> Result<()> {
    match fields.iter().find(|(_, given)| *given) {
        Some((field, _)) => Err(Error::invalid(*field, format!("does not belong to `{operation}`"))),
        None => Ok(()),
    }
}
