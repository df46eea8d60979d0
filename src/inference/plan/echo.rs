//! The plan as a request that makes the same images: `parameters` of a result.

use crate::conditioning::init_image::MaskOptions;
use crate::conditioning::prompt_options::EmbeddingChoice;
use crate::inference::plan::guidance::GuidanceOptions;
use crate::inference::plan::{ControlNetPlan, GenerationPlan, InitImagePlan, PassEntry};
use crate::inference::request::controlnet::ControlNetOptions;
use crate::inference::request::generate::{GenerateRequest, RefinerOptions, VaeSample};
use crate::layers::OneOrMany;
use crate::postprocessing::interface::OutputOptions;

impl From<&GenerationPlan> for GenerateRequest {
    fn from(plan: &GenerationPlan) -> Self {
        let (first, sampling, request) = (plan.first(), &plan.first().sampling, &plan.request);
        let seed = plan.seeds.first();
        let variation = seed.and_then(|seed| seed.variation);
        let n_iter = request.n_iter.unwrap_or(1);
        let embeddings = || plan.prompt.embeddings.iter().map(EmbeddingChoice::options).collect();
        let mut echo = Self {
            decode: Some(plan.memory.decode),
            slice: plan.memory.slice,
            offload: Some(plan.memory.offload),
            dtype: plan.dtype,
            quantization: plan.quantization,
            prompt: Some(plan.prompt.prompt.clone()),
            steps: Some(sampling.trajectory.len() as i64),
            sampler_name: Some(sampling.sampler.to_owned()),
            scheduler: Some(sampling.schedule.to_owned()),
            eta: Some(sampling.eta),
            seed: seed.and_then(|seed| i64::try_from(seed.main).ok()),
            subseed: variation.map_or(request.subseed, |variation| i64::try_from(variation.seed).ok()),
            subseed_strength: Some(variation.map_or(0.0, |variation| variation.strength)),
            rng: Some(plan.rng),
            width: Some(first.size.width as i64),
            height: Some(first.size.height as i64),
            batch_size: Some(plan.seeds.len() as i64 / n_iter.max(1)),
            n_iter: Some(n_iter),
            clip_skip: plan.prompt.clip_skip.map(i64::from),
            clip_stop_at_last_layers: None,
            prompt_weighting: Some(plan.prompt.weighting),
            comma_padding_backtrack: i64::try_from(plan.prompt.backtrack).ok(),
            embeddings: request.embeddings.as_ref().map(|_| embeddings()),
            controlnet: request.controlnet.as_ref().map(|list| controlnets(list, &plan.controlnets)),
            loras: plan.lora_options.clone(),
            model: Some(plan.checkpoint.base_name()),
            revision: plan.checkpoint.revision.clone(),
            refiner: plan.switch_at.map(|switch_at| RefinerOptions {
                model: plan.last().checkpoint.name.clone(),
                switch_at: Some(switch_at),
            }),
            // Files are never overwritten, and this name is taken by then.
            output: request.output.clone().map(|output| OutputOptions { path: None, name: None, ..output }),
            ..request.clone()
        };
        echo.set_guidance(plan);
        echo.set_init_image(plan);
        echo.set_hires(plan);
        echo
    }
}

impl GenerateRequest {
    fn set_guidance(&mut self, plan: &GenerationPlan) {
        let guidance = &plan.first().guidance;
        let GuidanceOptions {
            image_guidance_scale,
            pag_adaptive_scale,
            pag_applied_layers,
            dynamic_thresholding,
            skip_layer,
            freeu,
        } = plan.guidance_options.clone();
        self.cfg_scale = Some(guidance.scale);
        self.image_guidance_scale = image_guidance_scale;
        self.guidance_rescale = Some(guidance.rescale);
        self.cfg_interval = Some(guidance.interval);
        self.pag_scale = Some(guidance.perturbed_attention.as_ref().map_or(0.0, |pag| pag.scale));
        self.pag_adaptive_scale = pag_adaptive_scale;
        self.pag_applied_layers = pag_applied_layers;
        self.dynamic_thresholding = dynamic_thresholding;
        self.skip_layer = skip_layer;
        self.freeu = freeu;
    }

    fn set_init_image(&mut self, plan: &GenerationPlan) {
        let Some(InitImagePlan { options, strength, sampled, soft_mask, concat, .. }) = plan.init_image() else {
            return;
        };
        let sample = if *sampled { VaeSample::Sample } else { VaeSample::Mode };
        self.resize_mode = Some(options.resize);
        self.denoising_strength = *strength;
        self.init_sample = (!concat).then_some(sample);
        let Some(MaskOptions { image, invert, blur, only_masked, fill, paste }) = &options.mask else { return };
        self.mask_blur = Some(*blur);
        self.mask_invert = image.as_ref().map(|_| *invert);
        self.inpaint_full_res = Some(only_masked.is_some());
        self.inpaint_full_res_padding = only_masked.and_then(|padding| i64::try_from(padding).ok());
        self.inpainting_fill = Some(*fill);
        self.paste_back = Some(*paste);
        self.soft_mask = Some(*soft_mask);
    }

    fn set_hires(&mut self, plan: &GenerationPlan) {
        let Some(hires) = &plan.hires else { return };
        let enlarged = |entry: &PassEntry| matches!(entry, PassEntry::Latents(_) | PassEntry::Pixels(_));
        let pass = plan.passes.iter().find(|pass| enlarged(&pass.entry));
        let has_scaled_side = self.hr_resize_x.is_none() || self.hr_resize_y.is_none();
        self.enable_hr = Some(true);
        self.denoising_strength = Some(hires.strength);
        self.hr_scale = has_scaled_side.then_some(hires.scale);
        self.hr_upscaler = Some(hires.upscaler.to_owned());
        self.hr_second_pass_steps = pass.and_then(|pass| i64::try_from(pass.sampling.trajectory.len()).ok());
    }
}

fn controlnets(
    OneOrMany(entries): &OneOrMany<ControlNetOptions>,
    plans: &[ControlNetPlan],
) -> OneOrMany<ControlNetOptions> {
    let decided = |(options, plan): (&ControlNetOptions, &ControlNetPlan)| ControlNetOptions {
        preprocessor: Some(plan.hint.preprocessor.to_owned()),
        parameters: options.parameters.map(|_| plan.hint.parameters),
        weight: Some(plan.weight),
        start: Some(plan.start),
        end: Some(plan.end),
        guess_mode: Some(plan.guess_mode),
        resize_mode: Some(plan.hint.resize),
        ..options.clone()
    };
    OneOrMany(entries.iter().zip(plans).map(decided).collect())
}
