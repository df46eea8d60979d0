//! The text that an image file carries: AUTOMATIC1111's line of parameters, and the request that makes the image again.

use crate::device::interface::Quantization;
use crate::error::Result;
use crate::inference::plan::{ControlNetPlan, GenerationPlan};
use crate::inference::request::controlnet::MAX_CONTROLNETS;
use crate::inference::request::generate::{GenerateRequest, RefinerOptions};
use crate::inference::workers::guidance::Guidance;
use crate::model::lora::LoraChoice;
use crate::model::networks::interventions::FreeU;
use crate::noise::{RngKind, Seed, Variation};
use crate::postprocessing::metadata::{ImageText, Parameters};
use crate::units::ImageSize;

/// Keys of AUTOMATIC1111's ControlNet extension.
const CONTROLNET_KEYS: [&str; MAX_CONTROLNETS] = [
    "ControlNet 0",
    "ControlNet 1",
    "ControlNet 2",
    "ControlNet 3",
    "ControlNet 4",
    "ControlNet 5",
    "ControlNet 6",
    "ControlNet 7",
];

type Entry = (&'static str, String);

/// The text of the image with `seed`; the request in it makes this one image.
///
/// # Errors
/// Those of writing the request.
pub(crate) fn infotext(plan: &GenerationPlan, seed: Seed) -> Result<ImageText> {
    let echo = GenerateRequest::from(plan);
    let more = [image_entries(plan, &echo), seed_entries(seed), model_entries(plan, &echo)].concat();
    let first = plan.first();
    let parameters = Parameters {
        prompt: &with_tags(&plan.prompt.prompt, &plan.loras),
        negative_prompt: plan.prompt.negative_prompt.as_deref().unwrap_or_default(),
        steps: first.sampling.trajectory.len(),
        sampler: first.sampling.sampler,
        schedule: first.sampling.schedule,
        cfg_scale: first.guidance.scale,
        seed: seed.main,
        width: first.size.width,
        height: first.size.height,
        model: &plan.checkpoint.name,
        more: &more,
    };
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
        ..echo
    }
    .without_carried_images();
    ImageText::new(&parameters, &request)
}

fn image_entries(plan: &GenerationPlan, echo: &GenerateRequest) -> Vec<Entry> {
    let mut entries = Vec::new();
    if let Some(strength) = echo.denoising_strength {
        entries.push(("Denoising strength", strength.to_string()));
    }
    if let Some(blur) = echo.mask_blur {
        entries.push(("Mask blur", blur.to_string()));
    }
    if let Some(hires) = &plan.hires {
        let ImageSize { width, height } = plan.last().size;
        entries.push(("Hires resize", format!("{width}x{height}")));
        entries.push(("Hires upscaler", hires.upscaler.to_owned()));
    }
    if let Some(RefinerOptions { model, switch_at: Some(switch_at) }) = &echo.refiner {
        entries.push(("Refiner", model.clone()));
        entries.push(("Refiner switch at", switch_at.to_string()));
    }
    entries.extend(plan.controlnets.iter().map(controlnet_entry));
    entries
}

fn controlnet_entry(plan: &ControlNetPlan) -> Entry {
    let ControlNetPlan { file, hint, weight, start, end, guess_mode, .. } = plan;
    let guess = if *guess_mode { ", Guess Mode: True" } else { "" };
    let (preprocessor, name) = (hint.preprocessor, &file.name);
    let value = format!(
        "\"Module: {preprocessor}, Model: {name}, Weight: {weight}, Guidance Start: {start}, Guidance End: {end}{guess}\""
    );
    (CONTROLNET_KEYS.get(plan.index).copied().unwrap_or("ControlNet"), value)
}

fn seed_entries(seed: Seed) -> Vec<Entry> {
    let entries = |Variation { seed, strength }: Variation| {
        vec![("Variation seed", seed.to_string()), ("Variation seed strength", strength.to_string())]
    };
    seed.variation.map(entries).unwrap_or_default()
}

fn model_entries(plan: &GenerationPlan, echo: &GenerateRequest) -> Vec<Entry> {
    let guidance = &plan.first().guidance;
    let mut entries = Vec::new();
    if guidance.rescale > 0.0 {
        entries.push(("CFG Rescale", guidance.rescale.to_string()));
    }
    entries.extend(guidance_entries(guidance));
    if let Some(skip) = plan.prompt.clip_skip.filter(|&skip| skip > 0) {
        entries.push(("Clip skip", skip.to_string()));
    }
    if echo.quantization == Some(Quantization::Int8) {
        entries.push(("Quantization", Quantization::Int8.name().to_owned()));
    }
    entries.push(("RNG", if plan.rng == RngKind::Nv { "NV" } else { "CPU" }.to_owned()));
    entries.push(("Version", concat!("sdxl-worker ", env!("CARGO_PKG_VERSION")).to_owned()));
    entries
}

/// Guidance beyond its scale.
fn guidance_entries(guidance: &Guidance) -> Vec<Entry> {
    let mut entries = Vec::new();
    if let Some(scale) = guidance.image_scale {
        entries.push(("Image CFG scale", scale.to_string()));
    }
    if guidance.interval != [0.0, 1.0] {
        let [start, end] = guidance.interval;
        entries.push(("CFG interval", format!("{start} - {end}")));
    }
    if let Some(options) = &guidance.thresholding {
        entries.push(("Dynamic thresholding enabled", "True".to_owned()));
        entries.push(("Mimic scale", options.mimic.scale.to_string()));
        entries.push(("Threshold percentile", (options.percentile * 100.0).to_string()));
    }
    if let Some(pag) = &guidance.perturbed_attention {
        entries.push(("PAG scale", pag.scale.to_string()));
    }
    if let Some(skipped) = &guidance.skipped_layers {
        entries.push(("Skip layer scale", skipped.scale.to_string()));
    }
    if let Some(FreeU { stages: [first, second] }) = &guidance.freeu {
        let numbers = [first.backbone, second.backbone, first.skip, second.skip].map(|number| number.to_string());
        entries.push(("FreeU b1 b2 s1 s2", numbers.join(" ")));
    }
    entries
}

/// The prompt with its LoRAs as tags, as AUTOMATIC1111 writes it.
fn with_tags(prompt: &str, choices: &[LoraChoice]) -> String {
    let mut text = prompt.to_owned();
    for LoraChoice { file, unet, text_encoder, .. } in choices {
        let name = file.name.rsplit('/').next().unwrap_or_default();
        let name = name.strip_suffix(".safetensors").unwrap_or(name);
        let weights = if unet == text_encoder { unet.to_string() } else { format!("{text_encoder}:{unet}") };
        text.push_str(if text.is_empty() || text.ends_with(' ') { "" } else { " " });
        text.push_str(&format!("<lora:{name}:{weights}>"));
    }
    text
}
