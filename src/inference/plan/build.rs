//! From a request to a plan: everything that it leaves open is decided, and what cannot be done is refused, before
//! anything is loaded.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

use crate::conditioning::instructor::{EmbeddingChoice, PromptOptions};
use crate::conditioning::interface::PromptWeighting;
use crate::error::{Error, Result};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface::GenerateRequest;
use crate::inference::plan::controlnet::said;
use crate::inference::plan::guidance_build::guidance;
use crate::inference::plan::init_image::cut;
use crate::inference::plan::instruct_pix2pix::rewrites;
use crate::inference::plan::passes::First;
use crate::inference::plan::{GenerationPlan, TimeIds};
use crate::inference::request::lora::choose;
use crate::inference::request::memory::MemoryOptions;
use crate::managers::Managers;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::hub::reference::at_revision;
use crate::noise::{Seed, Variation};
use crate::postprocessing::interface::OutputOptions;
use crate::scheduler::interface::SamplingOptions;
use crate::units::ImageSize;

/// Steps where a request names none.
const STEPS: i64 = 25;
/// The refiner's aesthetic scores of a positive and a negative prompt.
const AESTHETIC: [f64; 2] = [6.0, 2.5];

impl InferenceInstructor {
    /// Decides everything that `request` leaves open.
    ///
    /// # Errors
    /// A value that cannot be used, or a model that cannot be found.
    pub fn plan(&self, request: &GenerateRequest, resources: &mut Managers) -> Result<GenerationPlan> {
        let mut prompt = request
            .prompt
            .clone()
            .ok_or_else(|| Error::invalid("prompt", "is missing: say what the image shall show"))?;
        let separate = [
            (Part::Vae, request.vae.as_deref()),
            (Part::Unet, request.unet.as_deref()),
            (Part::TextEncoder, request.text_encoder.as_deref()),
            (Part::TextEncoder2, request.text_encoder_2.as_deref()),
        ];
        let model = at_revision(request.model.as_deref(), request.revision.as_deref())?;
        let checkpoint = resources.model().catalog.resolve_with(model.as_deref(), &separate)?;
        let mut parameters = request.clone();
        let mut editing = self.editing(request, &mut parameters)?;
        rewrites(request, &checkpoint, &mut parameters, editing.as_mut())?;
        let size = self.size(request, self.size_of(editing.as_ref(), checkpoint.default_size()))?;
        let mut guidance = guidance(&mut parameters, &checkpoint)?;
        let options = SamplingOptions {
            sampler_name: request.sampler_name.clone(),
            scheduler: request.scheduler.clone(),
            steps: request.steps.or(Some(STEPS)).filter(|_| request.sigmas.is_none() && request.timesteps.is_none()),
            eta: request.eta,
            sigmas: request.sigmas.clone(),
            timesteps: request.timesteps.clone(),
            prediction_type: request.prediction_type,
            zero_terminal_snr: request.zero_terminal_snr,
        };
        let sampling = self.scheduler.plan(&options, &checkpoint.scheduler)?;
        let mut sampling = cut(request, editing.as_ref(), sampling)?;
        let first = First { checkpoint: &checkpoint, size, sampling: &mut sampling, options: &options };
        let mut further = self.further(request, first, &mut parameters, resources)?;
        let clip_skip = match request.clip_skip.unwrap_or(0) {
            skip @ 0..=64 => u32::try_from(skip).ok(),
            other => return Err(Error::invalid("clip_skip", format!("must be 0 to 64, got {other}"))),
        };
        let weighting = request.prompt_weighting.unwrap_or_default();
        let backtrack = match request.comma_padding_backtrack.unwrap_or(0) {
            tokens @ 0..=74 => tokens,
            other => return Err(Error::invalid("comma_padding_backtrack", format!("must be 0 to 74, got {other}"))),
        };
        let plain = weighting == PromptWeighting::None;
        let (loras, said_loras) =
            choose(request.loras.as_ref(), &mut prompt, plain, (&resources.model().catalog, &checkpoint.unet))?;
        let entries = request.embeddings.as_deref().unwrap_or_default();
        let embeddings = self.conditioning.embeddings(entries, &resources.model().catalog)?;
        let seeds = self.seeds(request)?;
        let first = seeds.first().copied();
        let variation = first.and_then(|seed| seed.variation);
        let n_iter = request.n_iter.unwrap_or(1);
        let time_ids = time_ids(request, size, &checkpoint)?;
        let controls = self.controls(request, resources)?;
        if request.inpaint_full_res == Some(true) && request.t2i_adapter.is_some() {
            return Err(Error::UnsupportedFeature {
                what: "`t2i_adapter` with `inpaint_full_res`".to_owned(),
                hint: Some("leave `inpaint_full_res` out".to_owned()),
                field: Some("t2i_adapter".to_owned()),
            });
        }
        let output = self.postprocessing.resolve(&request.output.clone().unwrap_or_default())?;
        let rng = request.rng.unwrap_or_default();
        let (mut t2i_adapter, mut ip_adapter) = (request.t2i_adapter.clone(), request.ip_adapter.clone());
        let catalog = &resources.model().catalog;
        let own = further.iter().filter(|further| further.checkpoint.key == checkpoint.key);
        let sizes: Vec<ImageSize> = [size].into_iter().chain(own.map(|further| further.size)).collect();
        let adapters = self.conditioning.plan_adapters(t2i_adapter.as_mut(), ip_adapter.as_mut(), &sizes, catalog)?;
        let memory = MemoryOptions {
            decode: request.decode.unwrap_or(self.settings.decode),
            slice: request.slice.or(self.settings.slice),
            offload: request.offload.unwrap_or(self.settings.offload),
            whole_unet: false,
        };
        let parameters = GenerateRequest {
            decode: Some(memory.decode),
            slice: memory.slice,
            offload: Some(memory.offload),
            prompt: Some(prompt.clone()),
            steps: Some(sampling.trajectory.len() as i64),
            sampler_name: Some(sampling.sampler.to_owned()),
            scheduler: Some(sampling.schedule.to_owned()),
            eta: Some(sampling.eta),
            seed: first.and_then(|seed| i64::try_from(seed.main).ok()),
            subseed: variation.map_or(request.subseed, |variation| i64::try_from(variation.seed).ok()),
            subseed_strength: Some(variation.map_or(0.0, |variation| variation.strength)),
            rng: Some(rng),
            width: Some(size.width as i64),
            height: Some(size.height as i64),
            batch_size: Some(seeds.len() as i64 / n_iter.max(1)),
            n_iter: Some(n_iter),
            clip_skip: clip_skip.map(i64::from),
            prompt_weighting: Some(weighting),
            comma_padding_backtrack: Some(backtrack),
            embeddings: request.embeddings.as_ref().map(|_| embeddings.iter().map(EmbeddingChoice::options).collect()),
            controlnet: said(request, &controls),
            loras: said_loras,
            model: Some(checkpoint.base_name()),
            revision: checkpoint.revision.clone(),
            t2i_adapter,
            ip_adapter,
            // A file of this name will be there by then, and is never overwritten.
            output: request.output.clone().map(|output| OutputOptions { path: None, name: None, ..output }),
            ..parameters
        };
        let mut prompt = PromptOptions {
            prompt,
            prompt_2: request.prompt_2.clone(),
            negative_prompt: request.negative_prompt.clone(),
            negative_prompt_2: request.negative_prompt_2.clone(),
            clip_skip,
            guided: guidance.is_on(),
            weighting,
            steps: sampling.steps(),
            backtrack: usize::try_from(backtrack).unwrap_or(0),
            embeddings,
            passes: 0,
            adapters: None,
        };
        prompt.passes = self.conditioning.check(&prompt, &checkpoint)?;
        guidance.parts = match guidance.is_on() {
            true => prompt.passes.saturating_sub(1).max(1),
            // Parts need the negative pass, guided or not.
            false if prompt.passes > 1 => prompt.passes - 1,
            false => 1,
        };
        further.iter_mut().for_each(|further| further.guidance.parts = guidance.parts);
        if guidance.parts > 1 {
            let away = [
                ("pag_scale", guidance.perturbed_attention.is_some()),
                ("skip_layer", guidance.skipped_layers.is_some()),
            ];
            if let Some((field, _)) = away.iter().find(|(_, given)| *given) {
                return Err(Error::invalid(*field, "cannot be used together with the parts that `AND` joins"));
            }
        }
        Ok(GenerationPlan {
            checkpoint,
            dtype: request.dtype,
            quantization: request.quantization,
            prompt,
            adapters,
            loras,
            size,
            seeds,
            rng,
            guidance,
            sampling,
            time_ids,
            editing,
            further,
            controls,
            output,
            memory,
            means: memory.first(),
            parameters,
        })
    }

    fn size(&self, request: &GenerateRequest, default: ImageSize) -> Result<ImageSize> {
        let max = i64::from(self.settings.max_side);
        let side = |field: &str, options: Option<i64>, default: usize| -> Result<usize> {
            let side = options.unwrap_or(default as i64);
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

    /// AUTOMATIC1111's rule: without a variation the seeds count up, with one all images share the seed and the
    /// variations count up (modules/processing.py).
    fn seeds(&self, request: &GenerateRequest) -> Result<Vec<Seed>> {
        let limit = i64::from(self.settings.max_batch_size);
        let batch = request.batch_size.unwrap_or(i64::from(self.settings.batch_size));
        let batches = request.n_iter.unwrap_or(1);
        for (field, count) in [("batch_size", batch), ("n_iter", batches)] {
            if !(1..=limit).contains(&count) {
                return Err(Error::invalid(field, format!("must be 1 to {limit}, got {count}")));
            }
        }
        let count = batch.saturating_mul(batches);
        if count > limit {
            let message = format!("must leave at most {limit} images, got {batches} batches of {batch}");
            return Err(Error::invalid("n_iter", message));
        }
        let strength = within("subseed_strength", request.subseed_strength.unwrap_or(0.0), 0.0, 1.0)?;
        if request.subseed_strength.is_none() && request.subseed.is_some_and(|subseed| subseed >= 0) {
            return Err(Error::invalid("subseed", "needs `subseed_strength`, which is 0 where it is left out"));
        }
        let numbers = |field: &str, first: Option<i64>, count: i64| -> Result<Range<u64>> {
            let first = match first {
                None | Some(-1) => RandomState::new().build_hasher().finish() & 0xffff_ffff,
                Some(seed) => u64::try_from(seed)
                    .map_err(|_| Error::invalid(field, format!("must be -1 or 0 to 2⁶³-1, got {seed}")))?,
            };
            let end = first + count.unsigned_abs();
            if i64::try_from(end - 1).is_err() {
                let message = format!("must leave room for {count} images below 2⁶³, got {first}");
                return Err(Error::invalid(field, message));
            }
            Ok(first..end)
        };
        let alone = |main: u64| Seed { main, variation: None };
        if strength == 0.0 {
            return Ok(numbers("seed", request.seed, count)?.map(alone).collect());
        }
        let Range { start: main, .. } = numbers("seed", request.seed, 1)?;
        let varied = |seed: u64| Seed { main, variation: Some(Variation { seed, strength }) };
        Ok(numbers("subseed", request.subseed, count)?.map(varied).collect())
    }
}

/// The size conditioning. Diffusers' rule: the negative pass has the positive one's unless it is given its own, and
/// then its crop is 0, 0 where none is given.
pub(crate) fn time_ids(request: &GenerateRequest, size: ImageSize, checkpoint: &Checkpoint) -> Result<TimeIds> {
    let image = [size.height as f64, size.width as f64];
    let pair = |field: &str, options: Option<[i64; 2]>, default: [f64; 2]| -> Result<[f64; 2]> {
        let Some(given) = options else { return Ok(default) };
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
    let aesthetic = [
        within("aesthetic_score", request.aesthetic_score.unwrap_or(AESTHETIC[0]), 0.0, 10.0)?,
        within("negative_aesthetic_score", request.negative_aesthetic_score.unwrap_or(AESTHETIC[1]), 0.0, 10.0)?,
    ];
    let ids = |original: [f64; 2], crop: [f64; 2], target: [f64; 2], aesthetic: f64| -> Vec<f64> {
        if wants_aesthetic_score(checkpoint) {
            vec![original[0], original[1], crop[0], crop[1], aesthetic]
        } else {
            [original, crop, target].concat()
        }
    };
    Ok(TimeIds {
        positive: ids(original, crop, target, aesthetic[0]),
        negative: ids(negative_original, negative_crop, negative_target, aesthetic[1]),
    })
}

pub(crate) fn within(field: &str, value: f64, low: f64, high: f64) -> Result<f64> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(field, format!("must be {low} to {high}, got {value}")))
}

/// The refiner's UNet has room for five numbers beside the pooled text, the base's for six.
fn wants_aesthetic_score(checkpoint: &Checkpoint) -> bool {
    checkpoint.text_encoder_2.projection_dim.and_then(|pooled| checkpoint.unet.time_ids(pooled)) == Some(5)
}
