//! Builds the plan of a request: fills in defaults and refuses mistakes before anything is loaded.

use std::sync::Arc;

use crate::conditioning::image_adapters::AdapterPlan;
use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::prompt_options::PromptOptions;
use crate::error::{Error, Result};
use crate::inference::interface::Settings;
use crate::inference::plan::controlnet::controlnets;
use crate::inference::plan::guidance::GuidanceOptions;
use crate::inference::plan::init_image::init_image;
use crate::inference::plan::instruct_pix2pix::concatenate;
use crate::inference::plan::limits::refuse_given;
use crate::inference::plan::lora::{PlannedLoras, loras, take_tags};
use crate::inference::plan::operation::Operation;
use crate::inference::plan::passes::{PassPlanner, sampling_options};
use crate::inference::plan::seeds::seeds;
use crate::inference::plan::size::size;
use crate::inference::plan::{GenerationPlan, HiresPlan, PassPlan};
use crate::inference::request::generate::{BatchRequest, GenerateRequest};
use crate::inference::request::memory::MemoryOptions;
use crate::model::catalog::Catalog;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::hub::reference::at_revision;
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::scheduler::instructor::SchedulerInstructor;

/// Plans requests with the settings of the domains that take part.
pub(crate) struct Planner<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) scheduler: &'a SchedulerInstructor,
    pub(crate) conditioning: &'a ConditioningInstructor,
    pub(crate) postprocessing: &'a PostprocessingInstructor,
    /// Finds models and adapters by name.
    pub(crate) catalog: &'a mut Catalog,
}

/// The passes of an image, and how the request states them.
struct PlannedPasses {
    passes: Vec<PassPlan>,
    hires: Option<HiresPlan>,
    switch_at: Option<f64>,
    guidance_options: GuidanceOptions,
}

impl Planner<'_> {
    /// The plan of `request`.
    ///
    /// # Errors
    /// A value that cannot be used, or a model that cannot be found.
    pub(crate) fn plan(&mut self, request: &GenerateRequest) -> Result<GenerationPlan> {
        let missing = || Error::invalid("prompt", "is missing: say what the image shall show");
        let mut text = request.prompt.clone().ok_or_else(missing)?;
        let checkpoint = self.checkpoint(request)?;
        let PlannedPasses { mut passes, hires, switch_at, guidance_options } = self.passes(request, &checkpoint)?;
        let weighting = request.prompt_weighting.unwrap_or_default();
        let tags = if weighting == PromptWeighting::None { Vec::new() } else { take_tags(&mut text)? };
        let PlannedLoras { choices, options } = loras(request.loras.as_ref(), &tags, self.catalog, &checkpoint.unet)?;
        let mut prompt = self.prompt(request, text, &passes[0])?;
        let seeds = seeds(request, self.settings)?;
        let controlnets = controlnets(request.controlnet.as_ref(), self.conditioning, self.catalog)?;
        let output = self.postprocessing.resolve(&request.output.clone().unwrap_or_default())?;
        let mut request = request.clone();
        let adapters = self.adapters(&mut request, &passes)?;
        prompt.passes = self.conditioning.check(&prompt, &checkpoint)?;
        join_parts(&prompt, &mut passes)?;
        let memory = self.memory(&request);
        Ok(GenerationPlan {
            checkpoint,
            dtype: request.dtype,
            quantization: request.quantization,
            prompt,
            seeds,
            rng: request.rng.unwrap_or_default(),
            passes,
            hires,
            switch_at,
            controlnets,
            adapters,
            loras: choices,
            output,
            memory,
            memory_plan: memory.first(),
            guidance_options,
            lora_options: options,
            request,
        })
    }

    /// The plan of `request` for one operation, which may require fields or exclude them.
    ///
    /// # Errors
    /// Those of [`Self::plan`]; `invalid_parameter` for fields that are missing or belong to another operation.
    pub(crate) fn operation(&mut self, operation: Operation, request: &GenerateRequest) -> Result<GenerationPlan> {
        operation.check(request)?;
        let plan = self.plan(request)?;
        operation.check_plan(&plan)?;
        Ok(plan)
    }

    /// The plans of a batch, all of them before the first is carried out.
    ///
    /// # Errors
    /// Those of [`Self::plan`]; `invalid_parameter` for an empty batch, or one that is too large.
    pub(crate) fn batch(&mut self, batch: &BatchRequest) -> Result<Vec<GenerationPlan>> {
        let (limit, got) = (self.settings.max_batch_size as usize, batch.requests.len());
        if !(1..=limit).contains(&got) {
            return Err(Error::invalid("requests", format!("must hold 1 to {limit} generations, got {got}")));
        }
        let requests = batch.requests.iter().enumerate();
        requests
            .map(|(index, request)| self.plan(request).map_err(|error| error.below(&format!("requests.{index}"))))
            .collect()
    }

    fn checkpoint(&mut self, request: &GenerateRequest) -> Result<Arc<Checkpoint>> {
        let separate = [
            (Part::Vae, request.vae.as_deref()),
            (Part::Unet, request.unet.as_deref()),
            (Part::TextEncoder, request.text_encoder.as_deref()),
            (Part::TextEncoder2, request.text_encoder_2.as_deref()),
        ];
        let model = at_revision(request.model.as_deref(), request.revision.as_deref())?;
        self.catalog.resolve_with(model.as_deref(), &separate)
    }

    fn passes(&mut self, request: &GenerateRequest, checkpoint: &Arc<Checkpoint>) -> Result<PlannedPasses> {
        let mut init_image = init_image(request, &self.conditioning.roots)?;
        concatenate(request, checkpoint, init_image.as_mut())?;
        let size = size(request, init_image.as_ref(), checkpoint, self.settings)?;
        let planner = PassPlanner {
            request,
            scheduler: self.scheduler,
            max_side: self.settings.max_side,
            sampling: sampling_options(request),
        };
        let mut guidance_options = GuidanceOptions::of(request);
        let mut last = planner.first(checkpoint, size, init_image, &mut guidance_options)?;
        let mut passes = Vec::new();
        let hires = match planner.hires(&last)? {
            Some((pass, hires)) => {
                passes.push(std::mem::replace(&mut last, pass));
                Some(hires)
            }
            None => None,
        };
        let Some(refiner) = &request.refiner else {
            passes.push(last);
            return Ok(PlannedPasses { passes, hires, switch_at: None, guidance_options });
        };
        let switch_at = planner.switch_at(refiner.switch_at)?;
        let model = self.catalog.resolve(Some(&refiner.model)).map_err(|error| error.below("refiner"))?;
        let refiner = planner.refiner(&mut last, model, switch_at)?;
        passes.extend([last, refiner]);
        Ok(PlannedPasses { passes, hires, switch_at: Some(switch_at), guidance_options })
    }

    /// Prompts and their options; `text` is the prompt without its LoRA tags.
    fn prompt(&self, request: &GenerateRequest, text: String, first: &PassPlan) -> Result<PromptOptions> {
        let backtrack = match request.comma_padding_backtrack.unwrap_or(0) {
            tokens @ 0..=74 => usize::try_from(tokens).unwrap_or(0),
            other => return Err(Error::invalid("comma_padding_backtrack", format!("must be 0 to 74, got {other}"))),
        };
        let embeddings = request.embeddings.as_deref().unwrap_or_default();
        Ok(PromptOptions {
            prompt: text,
            prompt_2: request.prompt_2.clone(),
            negative_prompt: request.negative_prompt.clone(),
            negative_prompt_2: request.negative_prompt_2.clone(),
            clip_skip: Some(clip_skip(request)?),
            guided: first.guidance.is_on(),
            weighting: request.prompt_weighting.unwrap_or_default(),
            steps: first.sampling.steps(),
            backtrack,
            embeddings: self.conditioning.embeddings(embeddings, self.catalog)?,
            passes: 0,
            adapters: None,
        })
    }

    /// Image adapters of `request`, whose options are completed with their defaults.
    fn adapters(&self, request: &mut GenerateRequest, passes: &[PassPlan]) -> Result<AdapterPlan> {
        if request.inpaint_full_res == Some(true) && request.t2i_adapter.is_some() {
            return Err(Error::UnsupportedFeature {
                what: "`t2i_adapter` with `inpaint_full_res`".to_owned(),
                hint: Some("leave `inpaint_full_res` out".to_owned()),
                field: Some("t2i_adapter".to_owned()),
            });
        }
        let own = passes.iter().filter(|pass| pass.checkpoint.key == passes[0].checkpoint.key);
        let sizes: Vec<_> = own.map(|pass| pass.size).collect();
        let (features, pictures) = (request.t2i_adapter.as_mut(), request.ip_adapter.as_mut());
        self.conditioning.plan_adapters(features, pictures, &sizes, self.catalog)
    }

    fn memory(&self, request: &GenerateRequest) -> MemoryOptions {
        MemoryOptions {
            decode: request.decode.unwrap_or(self.settings.decode),
            slice: request.slice.or(self.settings.slice),
            offload: request.offload.unwrap_or(self.settings.offload),
            whole_unet: false,
        }
    }
}

/// Layers left out before the penultimate one. Diffusers counts them from 0, AUTOMATIC1111 counts layers from the last, 1.
///
/// # Errors
/// `invalid_parameter` for a number out of range, or if both fields are given.
fn clip_skip(request: &GenerateRequest) -> Result<u32> {
    const STOP_AT: &str = "CLIP_stop_at_last_layers";
    match (request.clip_skip, request.clip_stop_at_last_layers) {
        (Some(_), Some(_)) => Err(Error::invalid(STOP_AT, "and `clip_skip` must not both be given")),
        (None, Some(1)) => Err(Error::invalid(
            STOP_AT,
            "must be 2 or more, got 1: SDXL's conditioning starts at the penultimate layer",
        )),
        (None, Some(layer @ 2..=66)) => Ok((layer - 2) as u32),
        (None, Some(layer)) => Err(Error::invalid(STOP_AT, format!("must be 2 to 66, got {layer}"))),
        (skip @ (None | Some(0..=64)), None) => Ok(skip.unwrap_or(0) as u32),
        (Some(skip), None) => Err(Error::invalid("clip_skip", format!("must be 0 to 64, got {skip}"))),
    }
}

/// Counts the prompt's parts, which `AND` joins, in the guidance of every pass.
///
/// # Errors
/// `invalid_parameter` for guidance that takes one part only.
fn join_parts(prompt: &PromptOptions, passes: &mut [PassPlan]) -> Result<()> {
    // Several parts need the negative pass, guided or not.
    let negative = usize::from(prompt.guided || prompt.passes > 1);
    let parts = prompt.passes.saturating_sub(negative).max(1);
    for pass in passes.iter_mut() {
        pass.guidance.parts = parts;
    }
    if parts == 1 {
        return Ok(());
    }
    let guidance = &passes[0].guidance;
    let given =
        [("pag_scale", guidance.perturbed_attention.is_some()), ("skip_layer", guidance.skipped_layers.is_some())];
    refuse_given(&given, "cannot be used together with the parts that `AND` joins")
}
