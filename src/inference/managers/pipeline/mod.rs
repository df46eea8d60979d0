//! Makes the latents of an image: one loop over the passes of a plan.

mod controlnet;
mod start;
mod vae;

use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;

use crate::conditioning::image_adapters::{AdaptTask, Adaptation};
use crate::conditioning::init_image::{InitImage, Paste};
use crate::conditioning::interface::{AppliedEmbedding, CacheCount};
use crate::conditioning::prompt_options::PromptOptions;
use crate::conditioning::prompt_schedule::PromptConditioning;
use crate::conditioning::{PrepareInitImage, PrepareInitImageTask};
use crate::context::{Context, PreviewOptions, Progress, Stage};
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::inference::managers::pipeline::controlnet::{ControlNetTask, PreparedControlNets, prepare_controlnets};
use crate::inference::managers::pipeline::start::{PassEnd, PassStart, StartTask, start};
use crate::inference::managers::pipeline::vae::decode;
use crate::inference::managers::{Domains, Session, throughput_key};
use crate::inference::plan::{GenerationPlan, PassPlan};
use crate::inference::request::lora::AppliedAdapter;
use crate::inference::request::memory::Offload;
use crate::inference::request::result::CacheUse;
use crate::inference::workers::controlnet::ControlNets;
use crate::inference::workers::denoise::{Denoise, DenoiseTask};
use crate::inference::workers::prepare::{Prepare, PrepareTask};
use crate::inference::workers::preview::{Preview, PreviewTask};
use crate::inference::workers::prompts::Prompts;
use crate::managers::throughput::Work;
use crate::model::lora::LoraStack;
use crate::model::managers::Vae;
use crate::noise::Seed;
use crate::postprocessing::instructor::PostprocessingInstructor;

/// Makes the images of one plan, and keeps what they share.
pub struct Pipeline<'a> {
    domains: Domains<'a>,
    init_image: Option<InitImage>,
    /// Changes the networks of the request's model.
    stack: Arc<LoraStack>,
    /// One for each pass that has begun.
    passes: Vec<PassState>,
}

/// Inputs of a pass that all images share, prepared by the first one.
struct PassState {
    controlnets: ControlNets,
    /// Hints that earlier requests had made, and that this one made.
    hints: CacheCount,
    adaptation: Adaptation,
    prompts: Prompts,
}

/// Reports steps and previews of a pass.
struct StepReport<'a> {
    plan: &'a GenerationPlan,
    /// Steps of earlier passes.
    before: usize,
    preview: Option<(PreviewOptions, Arc<Vae>)>,
    postprocessing: &'a PostprocessingInstructor,
    placement: &'a Placement,
    ctx: &'a Context,
}

impl<'a> Pipeline<'a> {
    /// # Errors
    /// Those of the request's image and of its LoRAs' headers.
    pub fn new(plan: &GenerationPlan, domains: Domains<'a>, ctx: &Context) -> Result<Self> {
        let size = plan.first().size;
        let init_image = plan.init_image().map(|plan| PrepareInitImageTask { options: &plan.options, size });
        let init_image = init_image.map(|task| ctx.perform(&PrepareInitImage, task)).transpose()?;
        let stack = Arc::new(LoraStack::open(&plan.loras, &plan.checkpoint, ctx)?);
        Ok(Self { domains, init_image, stack, passes: Vec::new() })
    }

    /// Latents of the image with `seed`: `[1, H/8, W/8, C]`, f32, in the UNet's scale.
    ///
    /// # Errors
    /// Those of loading and of the networks; `cancelled`, `deadline_exceeded`, `numerical_error`.
    pub fn latents(&mut self, plan: &GenerationPlan, seed: Seed, session: &mut Session<'_>) -> Result<Tensor> {
        let mut end: Option<PassEnd> = None;
        for (index, pass) in plan.passes.iter().enumerate() {
            let task =
                StartTask { plan, pass, seed, init_image: self.init_image.as_ref(), device: self.domains.device };
            let start = start(&task, end, session)?;
            if !plan.passes.iter().all(|pass| plan.is_own_model(pass)) {
                self.domains.memory.free_for(&pass.checkpoint, session.managers);
            }
            if self.passes.len() == index {
                let state = self.prepare(plan, index, session)?;
                self.passes.push(state);
            }
            end = Some(self.denoise(plan, index, start, session)?);
        }
        end.map(|end| end.latents).ok_or_else(|| Error::bug("a plan without passes"))
    }

    /// The image of `latents`.
    ///
    /// # Errors
    /// Those of loading and of the decoder.
    pub fn pixels(&self, plan: &GenerationPlan, latents: &Tensor, session: &mut Session<'_>) -> Result<Rgb8> {
        decode(plan, latents, self.domains.device, session)
    }

    /// LoRAs over the networks of the request's model.
    pub(crate) fn stack(&self) -> &LoraStack {
        &self.stack
    }

    /// The part of the request's image that a result is pasted into.
    pub(crate) fn paste(&self) -> Option<&Paste> {
        self.init_image.as_ref()?.paste.as_ref()
    }

    /// Textual inversions that the prompts used.
    pub(crate) fn embeddings(&self) -> Vec<AppliedEmbedding> {
        self.passes.first().map(|pass| pass.prompts.schedule.applied.clone()).unwrap_or_default()
    }

    /// Prompts and hints that earlier requests had computed.
    pub(crate) fn cache(&self) -> CacheUse {
        let hits = self.passes.iter().map(|pass| pass.hints.hits).sum();
        let misses = self.passes.iter().map(|pass| pass.hints.misses).sum();
        let embeddings = self.passes.first().map(|pass| pass.prompts.schedule.cache).unwrap_or_default();
        CacheUse { embeddings, hints: CacheCount { hits, misses } }
    }

    /// Keys of each adapter's file that were applied.
    pub(crate) fn adapters(&self) -> Vec<AppliedAdapter> {
        let pictures = self.passes.first().map_or(&[][..], |pass| &pass.adaptation.facts);
        let pictures = pictures.iter().cloned().map(AppliedAdapter::Picture);
        pictures.chain(self.stack.facts().into_iter().map(AppliedAdapter::Lora)).collect()
    }

    /// LoRAs over the networks of a pass: they are named for the request's model, and a refiner is another one.
    fn stack_of(&self, plan: &GenerationPlan, pass: &PassPlan) -> Arc<LoraStack> {
        if plan.is_own_model(pass) { Arc::clone(&self.stack) } else { Arc::default() }
    }

    /// ControlNets, adapters and prompts of a pass. ControlNets and adapters skip a refiner's pass.
    fn prepare(&self, plan: &GenerationPlan, index: usize, session: &mut Session<'_>) -> Result<PassState> {
        let (pass, conditioning) = (&plan.passes[index], self.domains.conditioning);
        let mut state = PreparedControlNets::default();
        let mut adaptation = Adaptation::default();
        if !pass.is_carried() && plan.is_own_model(pass) {
            let task = ControlNetTask {
                plan,
                pass,
                cut: self.init_image.as_ref().and_then(|image| image.cut),
                earlier: self.passes.iter().map(|pass| &pass.controlnets).collect(),
                conditioning,
            };
            state = prepare_controlnets(&task, session)?;
            let Session { placement, managers, ctx } = session;
            let guided = plan.prompt.passes > 1;
            let task = AdaptTask { plan: &plan.adapters, size: pass.size, guided, placement };
            adaptation = conditioning.adapt(task, &mut managers.conditioning, ctx)?;
        }
        let options = PromptOptions {
            steps: plan.span(index).steps,
            adapters: Some(self.stack_of(plan, pass)),
            ..plan.prompt.clone()
        };
        let Session { placement, managers, ctx } = session;
        let schedule =
            conditioning.condition(&options, &pass.checkpoint, &mut managers.conditioning, placement, ctx)?;
        let PreparedControlNets { controlnets, hints } = state;
        Ok(PassState { controlnets, hints, adaptation, prompts: Prompts::new(schedule) })
    }

    fn denoise(
        &self,
        plan: &GenerationPlan,
        index: usize,
        PassStart { x, mut noise, masking }: PassStart,
        session: &mut Session<'_>,
    ) -> Result<PassEnd> {
        let (pass, state) = (&plan.passes[index], &self.passes[index]);
        let Session { placement, managers, ctx } = session;
        let (placement, ctx) = (*placement, *ctx);
        if plan.memory_plan.offload != Offload::None {
            managers.model().dismiss(&pass.checkpoint);
        }
        let stack = self.stack_of(plan, pass);
        let unet = managers.model().unets.adapted(&pass.checkpoint, &stack, placement, ctx)?;
        let preview = match ctx.preview() {
            Some(options) => Some((options, managers.model().vaes.acquire(&plan.checkpoint, placement, ctx)?)),
            None => None,
        };
        let before = plan.passes[..index].iter().map(|pass| pass.sampling.steps()).sum();
        let report = StepReport { plan, before, preview, postprocessing: self.domains.postprocessing, placement, ctx };
        let prepare = |conditioning: &PromptConditioning| {
            let task = PrepareTask {
                unet: &unet,
                controlnets: &state.controlnets,
                adaptation: &state.adaptation,
                conditioning,
                time_ids: &pass.time_ids,
                guidance: &pass.guidance,
                placement,
                batch: 1,
            };
            ctx.perform(&Prepare, task)
        };
        let begun = Instant::now();
        let task = DenoiseTask {
            unet: &unet,
            controlnets: &state.controlnets,
            prompts: &state.prompts,
            prepare: &prepare,
            span: plan.span(index),
            sampling: &pass.sampling,
            x,
            masking: masking.as_ref(),
            continues: plan.continues(index),
            slice: plan.memory_plan.slice,
            noise: &mut noise,
            placement,
            on_step: &mut |completed, x0| report.on_step(completed, x0),
        };
        let latents = ctx.stage(Stage::Denoise, || ctx.perform(&Denoise, task))?;
        let evaluations = pass.guidance.evaluations(&pass.sampling) * pass.positions();
        let key = throughput_key(&pass.checkpoint, placement);
        managers.published.throughput.record(key, Work::Evaluation, evaluations, begun.elapsed());
        Ok(PassEnd { latents, noise, masking, took_mask: pass.checkpoint.takes_mask() })
    }
}

impl StepReport<'_> {
    /// Reports `completed` steps of the pass; `x0` is its latest estimate of the image.
    fn on_step(&self, completed: usize, x0: &Tensor) -> Result<()> {
        let (done, total) = (self.before + completed, self.plan.steps());
        self.ctx.progress(Progress::Step { stage: Stage::Denoise, done, total });
        let Some((PreviewOptions { every, max_side }, vae)) = &self.preview else { return Ok(()) };
        if done.is_multiple_of(*every) && done < total {
            let task = PreviewTask {
                decoder: &vae.decoder,
                config: &self.plan.checkpoint.vae,
                x0,
                max_side: *max_side,
                placement: self.placement,
            };
            let small = self.ctx.perform(&Preview, task)?;
            let png = self.postprocessing.preview(&small, self.ctx)?.into();
            self.ctx.progress(Progress::Preview { step: done, png });
        }
        Ok(())
    }
}
