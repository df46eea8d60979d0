//! One image, run by run: where it starts, its latents, its pixels.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;

use crate::conditioning::image_adapters::Adaptation;
use crate::conditioning::init_image::{InitImage, InpaintingFill, Paste};
use crate::conditioning::instructor::{Conditioning, PromptOptions};
use crate::conditioning::interface::{AppliedEmbedding, CacheCount};
use crate::context::{Context, Progress, Stage};
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::image::pixels::{Gray8, Rgb8};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface::DecodeExtent;
use crate::inference::plan::controlnet::ControlledRun;
use crate::inference::plan::guidance::Guidance;
use crate::inference::plan::{Entry, GenerationPlan, InitImagePlan, PassPlan, TimeIds};
use crate::inference::request::lora::AppliedAdapter;
use crate::inference::request::memory::Offload;
use crate::inference::workers::control::Controls;
use crate::inference::workers::decode::{Decode, DecodeTask};
use crate::inference::workers::denoise::{Denoise, DenoiseTask, Prepare, PrepareTask};
use crate::inference::workers::latents::{Encode, EncodeTask, Masking, Outside, hidden, mask_of_latents, noised};
use crate::inference::workers::preview::{Preview, PreviewTask};
use crate::inference::workers::prompts::Prompts;
use crate::managers::Managers;
use crate::managers::throughput::{ThroughputKey, Work};
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::LoraStack;
use crate::model::managers::Vae;
use crate::model::networks::vae::Extent;
use crate::noise::{NoiseSource, Seed};
use crate::postprocessing::upscaler::UpscaleTask;
use crate::scheduler::plan::SamplingPlan;
use crate::units::ImageSize;

/// What every image of a request has in common, made once.
pub(crate) struct Shared {
    canvas: Option<InitImage>,
    /// One a run, made where it is first used.
    prompts: Vec<Option<Prompts>>,
    /// Likewise.
    controls: Vec<Option<Controls>>,
    /// Likewise.
    adaptations: Vec<Option<Adaptation>>,
    /// What changes the networks of the request's model.
    stack: Arc<LoraStack>,
    /// Hints of ControlNets that earlier requests had made, and that this one made.
    pub(crate) hints: CacheCount,
}

/// One run over latents.
#[derive(Clone, Copy)]
struct Run<'a> {
    /// Its place among the runs of an image.
    index: usize,
    checkpoint: &'a Checkpoint,
    size: ImageSize,
    sampling: &'a SamplingPlan,
    time_ids: &'a TimeIds,
    guidance: &'a Guidance,
    /// Whether it goes on from latents that are half denoised.
    refines: bool,
    /// Whether such a run goes on from its own.
    goes_on: bool,
    /// Steps of the runs before it.
    before: usize,
    pass: Pass,
}

/// What a prompt's schedule divides: runs that carry latents on are one pass.
#[derive(Clone, Copy)]
struct Pass {
    steps: usize,
    /// Steps of the pass before this run.
    before: usize,
}

/// Where a run starts.
pub(crate) struct Start<M> {
    pub(crate) x: Tensor,
    pub(crate) masking: Option<M>,
}

/// The compute thread's things.
pub(crate) type Hands<'a> = (&'a Placement, &'a mut Managers, &'a Context);

impl Shared {
    /// The textual inversions that the prompts used, and what of the prompts was known already.
    pub(crate) fn told(&self) -> (Vec<AppliedEmbedding>, CacheCount) {
        let first = self.prompts.iter().flatten().next();
        first.map(|prompts| (prompts.script.applied.clone(), prompts.script.cache)).unwrap_or_default()
    }

    /// What each adapter did with its file.
    pub(crate) fn adapted(&self) -> Vec<AppliedAdapter> {
        let pictures = self.adaptations.iter().flatten().next().map_or(&[][..], |adaptation| &adaptation.facts);
        let pictures = pictures.iter().cloned().map(AppliedAdapter::Picture);
        pictures.chain(self.stack.facts().into_iter().map(AppliedAdapter::Lora)).collect()
    }

    /// What lies over the networks of the request's model.
    pub(crate) fn stack(&self) -> &LoraStack {
        &self.stack
    }

    /// How a result goes back into the request's image.
    pub(crate) fn paste(&self) -> Option<&Paste> {
        self.canvas.as_ref()?.paste.as_ref()
    }
}

impl InferenceInstructor {
    /// # Errors
    /// Those of the request's image.
    pub(crate) fn shared(&self, plan: &GenerationPlan, ctx: &Context) -> Result<Shared> {
        let canvas = |editing: &InitImagePlan| self.conditioning.canvas(&editing.canvas, plan.size, ctx);
        let canvas = plan.editing.as_ref().map(canvas).transpose()?;
        let runs = 1 + plan.further.len();
        Ok(Shared {
            canvas,
            prompts: (0..runs).map(|_| None).collect(),
            controls: (0..runs).map(|_| None).collect(),
            adaptations: (0..runs).map(|_| None).collect(),
            stack: Arc::new(LoraStack::open(&plan.loras, &plan.checkpoint, ctx)?),
            hints: CacheCount::default(),
        })
    }

    /// Final latents of the image with `seed`: `[1, H/8, W/8, C]`, f32, in the VAE's scale.
    ///
    /// # Errors
    /// Loading's and the networks' own, `cancelled`, `deadline_exceeded`, `numerical_error`.
    pub fn latents(
        &self,
        plan: &GenerationPlan,
        seed: Seed,
        placement: &Placement,
        resources: &mut Managers,
        ctx: &Context,
    ) -> Result<Tensor> {
        let mut shared = self.shared(plan, ctx)?;
        self.draw(plan, seed, &mut shared, (placement, resources, ctx))
    }

    /// [`Self::latents`], with what the images of a request share.
    pub(crate) fn draw(
        &self,
        plan: &GenerationPlan,
        seed: Seed,
        shared: &mut Shared,
        (placement, resources, ctx): Hands<'_>,
    ) -> Result<Tensor> {
        let mut noise = self.noise(plan, seed, plan.size, placement);
        let run = Run {
            index: 0,
            checkpoint: &plan.checkpoint,
            size: plan.size,
            sampling: &plan.sampling,
            time_ids: &plan.time_ids,
            guidance: &plan.guidance,
            refines: false,
            goes_on: carried(&plan.further) > 0,
            before: 0,
            pass: Pass { steps: plan.sampling.steps() + carried(&plan.further), before: 0 },
        };
        let mut pass = run.pass;
        let start = self.start(plan, shared.canvas.as_ref(), &mut noise, (placement, resources, ctx))?;
        let Start { x, mut masking } = start;
        let start = Start { x, masking: masking.as_ref() };
        let mut latents = self.run(plan, run, start, &mut noise, shared, (placement, &mut *resources, ctx))?;
        let (mut before, mut took_mask) = (plan.sampling.steps(), plan.checkpoint.takes_mask());
        let mut walked = before;
        for (index, further) in plan.further.iter().enumerate() {
            pass = match further.entry {
                Entry::Carried => Pass { before: pass.before + walked, ..pass },
                Entry::Latents(_) | Entry::Pixels(_) => {
                    let after = plan.further.get(index + 1..).unwrap_or_default();
                    Pass { steps: further.sampling.steps() + carried(after), before: 0 }
                }
            };
            let x = match further.entry {
                Entry::Carried => latents,
                Entry::Latents(upscaler) => {
                    let (width, height) = (further.size.width / 8, further.size.height / 8);
                    let larger = ctx.perform(upscaler, UpscaleTask { image: &latents, width, height })?;
                    noise = self.noise(plan, seed, further.size, placement);
                    noised(&larger, &noise.initial()?, further.sampling.first())?
                }
                Entry::Pixels(upscaler) => {
                    let image = self.pixels(plan, &latents, placement, resources, ctx)?;
                    let ImageSize { width, height } = further.size;
                    let larger = ctx.perform(upscaler, UpscaleTask { image: &image, width, height })?;
                    noise = self.noise(plan, seed, further.size, placement);
                    let latents = self.encoded(plan, &larger, Some(&mut noise), (placement, &mut *resources, ctx))?;
                    noised(&latents, &noise.initial()?, further.sampling.first())?
                }
            };
            let run = Run {
                index: index + 1,
                checkpoint: &further.checkpoint,
                size: further.size,
                sampling: &further.sampling,
                time_ids: &further.time_ids,
                guidance: &further.guidance,
                refines: matches!(further.entry, Entry::Carried),
                goes_on: carried(plan.further.get(index + 1..).unwrap_or_default()) > 0,
                before,
                pass,
            };
            walked = further.sampling.steps();
            before += walked;
            let takes_mask = further.checkpoint.takes_mask();
            match (further.entry, &masking) {
                // What is masked stays so, and what the other was told the refiner is told too.
                (Entry::Carried, Some(held)) if held.outside.is_some() || (took_mask && takes_mask) => {}
                _ if takes_mask => {
                    masking = Some(self.unmasked(plan, further.size, (placement, &mut *resources, ctx))?);
                }
                _ => masking = None,
            }
            took_mask = takes_mask;
            let start = Start { x, masking: masking.as_ref() };
            latents = self.run(plan, run, start, &mut noise, shared, (placement, &mut *resources, ctx))?;
        }
        Ok(latents)
    }

    fn noise(&self, plan: &GenerationPlan, seed: Seed, size: ImageSize, placement: &Placement) -> NoiseSource {
        let channels = plan.checkpoint.vae.latent_channels;
        let sides = (size.height / 8, size.width / 8);
        NoiseSource::new(plan.rng, &[seed.main], channels, sides.0, sides.1, &placement.device)
            .varied(&[seed.variation])
    }

    /// Where the first run starts. Noise is drawn in the reference's order: for the encoded image, for the start, for
    /// the encoded masked image, which the reference encodes also where its UNet does not take it.
    fn start(
        &self,
        plan: &GenerationPlan,
        canvas: Option<&InitImage>,
        noise: &mut NoiseSource,
        (placement, resources, ctx): Hands<'_>,
    ) -> Result<Start<Masking>> {
        let takes_mask = plan.checkpoint.takes_mask();
        let (Some(editing), Some(canvas)) = (&plan.editing, canvas) else {
            let x = (noise.initial()? * plan.sampling.init_scale)?;
            let masking = match takes_mask {
                true => Some(self.unmasked(plan, plan.size, (placement, resources, ctx))?),
                false => None,
            };
            return Ok(Start { x, masking });
        };
        if editing.beside {
            return self.beside(plan, canvas, noise, (placement, resources, ctx));
        }
        let mut encode = |pixels: &Tensor, noise: &mut NoiseSource| {
            let vae = resources.model().vaes.acquire(&plan.checkpoint, placement, ctx)?;
            self.encode(plan, &vae, pixels, editing.sampled.then_some(noise), placement, ctx)
        };
        let first = plan.sampling.first();
        let Some(mask) = &canvas.mask else {
            let latents = encode(&canvas.image.to_tensor(&placement.device)?, noise)?;
            let x = if editing.adds_noise { noised(&latents, &noise.initial()?, first)? } else { latents };
            let masking = match takes_mask {
                true => Some(self.unmasked(plan, plan.size, (placement, resources, ctx))?),
                false => None,
            };
            return Ok(Start { x, masking });
        };
        let in_latents = mask_of_latents(mask, editing.soft, plan.checkpoint.vae.reduction(), placement)?;
        let latents = match takes_mask && editing.from_noise {
            true => None,
            false => Some(encode(&canvas.image.to_tensor(&placement.device)?, noise)?),
        };
        let drawn = noise.initial()?;
        let x = match &latents {
            _ if editing.from_noise => (&drawn * plan.sampling.init_scale)?,
            Some(latents) => {
                let beneath = beneath(latents, &drawn, &in_latents, editing)?;
                if editing.adds_noise { noised(&beneath, &drawn, first)? } else { beneath }
            }
            None => return Err(Error::bug("a run that starts from an image has none")),
        };
        let masking = match latents.filter(|_| !takes_mask) {
            Some(latents) => {
                if editing.sampled {
                    noise.draw()?;
                }
                Masking { mask: in_latents, outside: Some(Outside { latents, noise: drawn }), beside: None }
            }
            None => {
                let masked = encode(&hidden(&canvas.image, mask, placement)?, noise)?;
                let beside = Some(Tensor::cat(&[&in_latents, &masked], 3)?);
                Masking { mask: in_latents, outside: None, beside }
            }
        };
        Ok(Start { x, masking: Some(masking) })
    }

    /// What an inpainting UNet is told where everything is painted: a mask of ones over a mid-grey picture.
    fn unmasked(&self, plan: &GenerationPlan, size: ImageSize, hands: Hands<'_>) -> Result<Masking> {
        let (ImageSize { width, height }, placement) = (size, hands.0);
        let all = Gray8 { width, height, data: vec![255; width * height] };
        let mask = mask_of_latents(&all, false, plan.checkpoint.vae.reduction(), placement)?;
        let grey = Rgb8 { width, height, data: vec![0; 3 * width * height] };
        let vae = hands.1.model().vaes.acquire(&plan.checkpoint, placement, hands.2)?;
        let masked = self.encode(plan, &vae, &hidden(&grey, &all, placement)?, None, placement, hands.2)?;
        let beside = Some(Tensor::cat(&[&mask, &masked], 3)?);
        Ok(Masking { mask, outside: None, beside })
    }

    /// The latents of a picture.
    pub(crate) fn encoded(
        &self,
        plan: &GenerationPlan,
        picture: &Rgb8,
        noise: Option<&mut NoiseSource>,
        (placement, resources, ctx): Hands<'_>,
    ) -> Result<Tensor> {
        let vae = resources.model().vaes.acquire(&plan.checkpoint, placement, ctx)?;
        self.encode(plan, &vae, &picture.to_tensor(&placement.device)?, noise, placement, ctx)
    }

    fn encode(
        &self,
        plan: &GenerationPlan,
        vae: &Vae,
        pixels: &Tensor,
        noise: Option<&mut NoiseSource>,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Tensor> {
        let config = &plan.checkpoint.vae;
        let strips = plan.means.decode == DecodeExtent::Strips;
        let extent = if strips { Extent::Strips } else { Extent::Whole };
        ctx.stage(Stage::Encode, || ctx.perform(&Encode, EncodeTask { vae, config, pixels, noise, extent, placement }))
    }

    /// What adapters made of their pictures. A run of another model, as the refiner's, has none.
    fn adapted(
        &self,
        plan: &GenerationPlan,
        run: Run<'_>,
        (placement, resources, ctx): Hands<'_>,
    ) -> Result<Adaptation> {
        if run.refines || run.checkpoint.key != plan.checkpoint.key {
            return Ok(Adaptation::default());
        }
        let shape = (run.size, plan.prompt.passes > 1);
        self.conditioning.adapt(&plan.adapters, shape, &mut resources.conditioning, placement, ctx)
    }

    fn run(
        &self,
        plan: &GenerationPlan,
        run: Run<'_>,
        start: Start<&Masking>,
        noise: &mut NoiseSource,
        shared: &mut Shared,
        (placement, resources, ctx): Hands<'_>,
    ) -> Result<Tensor> {
        let Run { checkpoint, sampling, before, pass, .. } = run;
        if plan.further.iter().any(|further| further.checkpoint.key != plan.checkpoint.key) {
            self.memory().free_for(checkpoint, resources);
        }
        let Shared { canvas, prompts, controls, adaptations, hints, stack } = shared;
        // They are named for the request's model; a refiner is another one.
        let own = if checkpoint.key == plan.checkpoint.key { Arc::clone(stack) } else { Arc::default() };
        if matches!(controls.get(run.index), Some(None)) {
            let cut = canvas.as_ref().and_then(|canvas| canvas.cut);
            let wanted = ControlledRun { checkpoint, size: run.size, placement, refines: run.refines, cut };
            let earlier: Vec<&Controls> = controls.iter().flatten().collect();
            let made = self.prepare_controls(plan, wanted, (&earlier, hints), resources, ctx)?;
            if let Some(place) = controls.get_mut(run.index) {
                *place = Some(made);
            }
        }
        let controls = controls.get(run.index).and_then(Option::as_ref);
        let controls = controls.ok_or_else(|| Error::bug("denoising without its ControlNets"))?;
        let adaptation = adaptations.get_mut(run.index).ok_or_else(|| Error::bug("a run without its adapters"))?;
        if adaptation.is_none() {
            *adaptation = Some(self.adapted(plan, run, (placement, &mut *resources, ctx))?);
        }
        let adaptation = adaptation.as_ref().ok_or_else(|| Error::bug("denoising without its adapters"))?;
        let prompts = prompts.get_mut(run.index).ok_or_else(|| Error::bug("a run without a prompt"))?;
        if prompts.is_none() {
            let options = PromptOptions { steps: pass.steps, adapters: Some(Arc::clone(&own)), ..plan.prompt.clone() };
            let script =
                self.conditioning.condition(&options, checkpoint, &mut resources.conditioning, placement, ctx)?;
            *prompts = Some(Prompts::new(script));
        }
        let prompts = prompts.as_ref().ok_or_else(|| Error::bug("denoising without a prompt"))?;
        if plan.means.offload != Offload::None {
            resources.model().dismiss(checkpoint);
        }
        let unet = resources.model().unets.adapted(checkpoint, &own, placement, ctx)?;
        let preview = match ctx.preview() {
            Some(options) => Some((options, resources.model().vaes.acquire(&plan.checkpoint, placement, ctx)?)),
            None => None,
        };
        let total = plan.steps();
        let mut observe = |done: usize, x0: &Tensor| -> Result<()> {
            let done = before + done;
            ctx.progress(Progress::Step { stage: Stage::Denoise, done, total });
            let Some((options, vae)) = &preview else { return Ok(()) };
            if done.is_multiple_of(options.every) && done < total {
                let (decoder, config, max_side) = (&vae.decoder, &plan.checkpoint.vae, options.max_side);
                let small = ctx.perform(&Preview, PreviewTask { decoder, config, x0, max_side, placement })?;
                let png = self.postprocessing.preview(&small, ctx)?.into();
                ctx.progress(Progress::Preview { step: done, png });
            }
            Ok(())
        };
        let begun = Instant::now();
        let latents = ctx.stage(Stage::Denoise, || {
            let prepare = |conditioning: &Conditioning| {
                let (time_ids, guidance) = (run.time_ids, run.guidance);
                let unet = &unet;
                let task =
                    PrepareTask { unet, controls, adaptation, conditioning, time_ids, guidance, placement, batch: 1 };
                ctx.perform(&Prepare, task)
            };
            let Start { x, masking } = start;
            let task = DenoiseTask {
                unet: &unet,
                controls,
                prompts,
                prepare: &prepare,
                before: pass.before,
                pass: pass.steps,
                sampling,
                x,
                masking,
                goes_on: run.goes_on,
                slice: plan.means.slice,
                noise,
                placement,
                observe: &mut observe,
            };
            ctx.perform(&Denoise, task)
        })?;
        let units = run.guidance.evaluations(sampling) * run.size.width * run.size.height / 64;
        let key = throughput_key(checkpoint, placement);
        resources.published.throughput.record(key, Work::Evaluation, units, begun.elapsed());
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
        resources: &mut Managers,
        ctx: &Context,
    ) -> Result<Rgb8> {
        let vae = resources.model().vaes.acquire(&plan.checkpoint, placement, ctx)?;
        let start = Instant::now();
        let images = ctx.stage(Stage::Decode, || {
            let (decoder, config) = (&vae.decoder, &plan.checkpoint.vae);
            let free = self.device.free(&resources.device);
            // What is left open is measured anew where it was not decided for less.
            let open = plan.memory.decode == DecodeExtent::Auto && plan.means.decode != DecodeExtent::Strips;
            let options = if open { DecodeExtent::Auto } else { plan.means.decode };
            let task = DecodeTask { decoder, config, latents, placement, options, free };
            ctx.perform(&Decode, task)
        })?;
        let units = latents.elem_count() / plan.checkpoint.vae.latent_channels.max(1);
        let key = throughput_key(&plan.checkpoint, placement);
        resources.published.throughput.record(key, Work::Decode, units, start.elapsed());
        images.into_iter().next().ok_or_else(|| Error::bug("the decoder gave no image"))
    }
}

fn throughput_key(checkpoint: &Checkpoint, placement: &Placement) -> ThroughputKey {
    ThroughputKey { model: checkpoint.key, dtype: placement.compute, quantization: placement.quantization }
}

/// The latents that a run starts from, where `fill` puts something else beneath the mask.
fn beneath(latents: &Tensor, noise: &Tensor, mask: &Tensor, editing: &InitImagePlan) -> Result<Tensor> {
    let fill = editing.canvas.mask.as_ref().map_or(InpaintingFill::Original, |mask| mask.fill);
    let seen = || -> Result<Tensor> { Ok(latents.broadcast_mul(&(1.0 - mask)?)?) };
    match fill {
        InpaintingFill::Original | InpaintingFill::Fill => Ok(latents.clone()),
        InpaintingFill::Zeros => seen(),
        InpaintingFill::Noise => Ok((seen()? + noise.broadcast_mul(mask)?)?),
    }
}

/// Steps of the runs at the beginning of `runs` that carry latents on.
fn carried(runs: &[PassPlan]) -> usize {
    runs.iter().take_while(|run| matches!(run.entry, Entry::Carried)).map(|run| run.sampling.steps()).sum()
}
