//! Guidance of a request: defaults, ranges, and the layers that a name matches.

use crate::error::{Error, Result, nearest};
use crate::inference::plan::limits::{refuse_given, within};
use crate::inference::request::generate::GenerateRequest;
use crate::inference::request::guidance::{DynamicThresholdingOptions, FreeUOptions, SkipLayerOptions};
use crate::inference::workers::guidance::{Guidance, PerturbedAttention, SkippedLayers};
use crate::inference::workers::thresholding::{Curve, Thresholding};
use crate::model::checkpoint::Checkpoint;
use crate::model::networks::interventions::{Change, FreeU, FreeUFactors, SelfAttention};

/// Default `cfg_scale`.
const CFG_SCALE: f64 = 5.0;
/// Diffusers' default `image_guidance_scale` of instruct-pix2pix.
const IMAGE_SCALE: f64 = 1.5;
/// Default layers for perturbed attention and skipped layers.
const LAYERS: &str = "mid";

/// A request's options for guidance, completed with their defaults.
#[derive(Clone, Debug, Default)]
pub struct GuidanceOptions {
    pub image_guidance_scale: Option<f64>,
    pub pag_adaptive_scale: Option<f64>,
    pub pag_applied_layers: Option<Vec<String>>,
    pub dynamic_thresholding: Option<DynamicThresholdingOptions>,
    pub skip_layer: Option<SkipLayerOptions>,
    pub freeu: Option<FreeUOptions>,
}

impl GuidanceOptions {
    pub(crate) fn of(request: &GenerateRequest) -> Self {
        Self {
            image_guidance_scale: request.image_guidance_scale,
            pag_adaptive_scale: request.pag_adaptive_scale,
            pag_applied_layers: request.pag_applied_layers.clone(),
            dynamic_thresholding: request.dynamic_thresholding.clone(),
            skip_layer: request.skip_layer.clone(),
            freeu: request.freeu.clone(),
        }
    }
}

/// Guidance of `request` for one model, whose layers `options` name; completes `options` with their defaults.
///
/// # Errors
/// `invalid_parameter` for numbers out of range and options that exclude each other; `unknown_name` for layers.
pub(crate) fn guidance(
    request: &GenerateRequest,
    options: &mut GuidanceOptions,
    checkpoint: &Checkpoint,
) -> Result<Guidance> {
    let scale = within("cfg_scale", request.cfg_scale.unwrap_or(CFG_SCALE), 0.0, 100.0)?;
    options.image_guidance_scale = image_scale(options.image_guidance_scale, checkpoint)?;
    let rescale = within("guidance_rescale", request.guidance_rescale.unwrap_or(0.0), 0.0, 1.0)?;
    let interval = interval("cfg_interval", request.cfg_interval.unwrap_or([0.0, 1.0]))?;
    let perturbed_attention = perturbed_attention(request.pag_scale, options, checkpoint)?;
    let thresholding = options.dynamic_thresholding.as_mut().map(|options| thresholding(options, scale)).transpose()?;
    if thresholding.is_some() {
        if scale <= 1.0 {
            return Err(Error::invalid("dynamic_thresholding", format!("needs `cfg_scale` above 1, got {scale}")));
        }
        if rescale > 0.0 {
            return Err(Error::invalid("guidance_rescale", "cannot be used together with `dynamic_thresholding`"));
        }
    }
    let skipped_layers = options.skip_layer.as_mut().map(|options| skipped_layers(options, checkpoint)).transpose()?;
    Ok(Guidance {
        scale,
        image_scale: options.image_guidance_scale,
        rescale,
        interval,
        thresholding,
        perturbed_attention,
        skipped_layers: skipped_layers.filter(|skipped| skipped.scale > 0.0),
        freeu: options.freeu.as_mut().map(freeu).transpose()?,
        parts: 1,
    })
}

fn image_scale(requested: Option<f64>, checkpoint: &Checkpoint) -> Result<Option<f64>> {
    const FIELD: &str = "image_guidance_scale";
    match requested {
        Some(_) if !checkpoint.family.edits => {
            Err(Error::invalid(FIELD, format!("needs a model that edits an image, and `{}` is none", checkpoint.name)))
        }
        None if !checkpoint.family.edits => Ok(None),
        requested => within(FIELD, requested.unwrap_or(IMAGE_SCALE), 1.0, 100.0).map(Some),
    }
}

fn perturbed_attention(
    requested: Option<f64>,
    options: &mut GuidanceOptions,
    checkpoint: &Checkpoint,
) -> Result<Option<PerturbedAttention>> {
    if requested.is_none() {
        let given = [
            ("pag_adaptive_scale", options.pag_adaptive_scale.is_some()),
            ("pag_applied_layers", options.pag_applied_layers.is_some()),
        ];
        refuse_given(&given, "needs `pag_scale`, which is 0 where it is left out")?;
    }
    let scale = within("pag_scale", requested.unwrap_or(0.0), 0.0, 100.0)?;
    let adaptive_scale = within("pag_adaptive_scale", options.pag_adaptive_scale.unwrap_or(0.0), 0.0, 100.0)?;
    if scale == 0.0 {
        return Ok(None);
    }
    options.pag_adaptive_scale = Some(adaptive_scale);
    let layers = options.pag_applied_layers.get_or_insert_with(|| vec![LAYERS.to_owned()]);
    let change = Change::Within { attention: SelfAttention::Identity, skips_feed_forward: false };
    let blocks = blocks("pag_applied_layers", layers, change, checkpoint)?;
    Ok(Some(PerturbedAttention { scale, adaptive_scale, blocks }))
}

fn skipped_layers(options: &mut SkipLayerOptions, checkpoint: &Checkpoint) -> Result<SkippedLayers> {
    let layers = options.layers.get_or_insert_with(|| vec![LAYERS.to_owned()]);
    let scale = within("skip_layer.scale", *options.scale.get_or_insert(2.8), 0.0, 100.0)?;
    let start = within("skip_layer.start", *options.start.get_or_insert(0.01), 0.0, 1.0)?;
    let stop = within("skip_layer.stop", *options.stop.get_or_insert(0.2), start, 1.0)?;
    let attention = *options.skip_attention.get_or_insert(true);
    let scores = *options.skip_attention_scores.get_or_insert(false);
    let skips_feed_forward = *options.skip_ff.get_or_insert(true);
    let within = |attention: SelfAttention| Change::Within { attention, skips_feed_forward };
    let change = match (attention, scores) {
        (true, true) => {
            let message = "cannot be used together with `skip_attention`, which is true where it is left out";
            return Err(Error::invalid("skip_layer.skip_attention_scores", message));
        }
        (true, false) if skips_feed_forward => Change::Skipped,
        (true, false) => within(SelfAttention::Skipped),
        (false, true) => within(SelfAttention::Identity),
        (false, false) if skips_feed_forward => within(SelfAttention::Kept),
        (false, false) => return Err(Error::invalid("skip_layer", "must skip something of its layers")),
    };
    let blocks = blocks("skip_layer.layers", layers, change, checkpoint)?;
    Ok(SkippedLayers { scale, interval: [start, stop], blocks })
}

fn freeu(options: &mut FreeUOptions) -> Result<FreeU> {
    let factor = |field: &str, options: &mut Option<f64>, default: f64| {
        within(&format!("freeu.{field}"), *options.get_or_insert(default), 0.0, 10.0)
    };
    let first =
        FreeUFactors { skip: factor("s1", &mut options.s1, 0.9)?, backbone: factor("b1", &mut options.b1, 1.3)? };
    let second =
        FreeUFactors { skip: factor("s2", &mut options.s2, 0.2)?, backbone: factor("b2", &mut options.b2, 1.4)? };
    Ok(FreeU { stages: [first, second] })
}

fn thresholding(options: &mut DynamicThresholdingOptions, scale: f64) -> Result<Thresholding> {
    let number = |field: &str, options: &mut Option<f64>, default: f64, high: f64| {
        within(&format!("dynamic_thresholding.{field}"), *options.get_or_insert(default), 0.0, high)
    };
    let value = number("sched_val", &mut options.sched_val, 1.0, 100.0)?;
    Ok(Thresholding {
        mimic: Curve {
            mode: *options.mimic_mode.get_or_insert_default(),
            scale: number("mimic_scale", &mut options.mimic_scale, 7.0, 100.0)?,
            least: number("mimic_scale_min", &mut options.mimic_scale_min, 0.0, 100.0)?,
            value,
        },
        guided: Curve {
            mode: *options.cfg_mode.get_or_insert_default(),
            scale,
            least: number("cfg_scale_min", &mut options.cfg_scale_min, 0.0, 100.0)?,
            value,
        },
        percentile: number("threshold_percentile", &mut options.threshold_percentile, 1.0, 1.0)?,
        separate: *options.separate_feature_channels.get_or_insert(true),
        startpoint: *options.scaling_startpoint.get_or_insert_default(),
        measure: *options.variability_measure.get_or_insert_default(),
        phi: number("interpolate_phi", &mut options.interpolate_phi, 1.0, 1.0)?,
    })
}

fn interval(field: &str, [start, end]: [f64; 2]) -> Result<[f64; 2]> {
    if 0.0 <= start && start <= end && end <= 1.0 {
        return Ok([start, end]);
    }
    Err(Error::invalid(field, format!("must be two shares of the steps, 0 to 1, rising, got [{start}, {end}]")))
}

/// `change` for every transformer block of the UNet that one of `layers` matches.
fn blocks(field: &str, layers: &[String], change: Change, checkpoint: &Checkpoint) -> Result<Vec<Option<Change>>> {
    let names = checkpoint.unet.transformer_blocks()?;
    if layers.is_empty() {
        return Err(Error::invalid(field, "must name a layer of the UNet, such as `mid`"));
    }
    if layers.len() > names.len() {
        let (most, got) = (names.len(), layers.len());
        return Err(Error::invalid(field, format!("must name at most {most} layers, which is all, got {got}")));
    }
    let mut blocks = vec![None; names.len()];
    for layer in layers {
        let part = canonical(layer);
        let mut found = false;
        for (block, name) in blocks.iter_mut().zip(&names) {
            if is_part(&part, name) {
                *block = Some(change);
                found = true;
            }
        }
        if !found {
            let nearest = nearest(layer, names.iter().map(String::as_str));
            let field = Some(field.to_owned());
            return Err(Error::UnknownName { kind: "layer", name: layer.clone(), nearest, field });
        }
    }
    Ok(blocks)
}

/// A name in diffusers' current form; `down.block_1.attentions_0` is its older one.
fn canonical(layer: &str) -> String {
    let layer = layer.replace("down.block_", "down_blocks.").replace("up.block_", "up_blocks.");
    layer.replace("attentions_", "attentions.")
}

/// True if `name` contains `part`, and `part` does not end within a number of `name`.
fn is_part(part: &str, name: &str) -> bool {
    let digit = |c: char| c.is_ascii_digit();
    let cut = |end: usize| part.ends_with(digit) && name.get(end..).is_some_and(|rest| rest.starts_with(digit));
    !part.is_empty() && name.match_indices(part).any(|(at, _)| !cut(at + part.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the transformer blocks of the demonstration model that `layer` matches.
    fn check(layer: &str, expected: usize) {
        let names = Checkpoint::demo().unwrap().unet.transformer_blocks().unwrap();
        let found = names.iter().filter(|name| is_part(&canonical(layer), name)).count();
        assert_eq!(found, expected, "`{layer}` in {names:?}");
    }

    #[test]
    fn layer_matches_any_part_of_a_block_name() {
        check("mid", 2);
        check("down", 3);
        check("down_blocks.1", 1);
        check("down.block_2.attentions_0", 2);
        check("up_blocks.0.attentions.1", 2);
        check("transformer_blocks.1", 4);
        check("mid_block.attentions.0.transformer_blocks.", 2);
        check("down_blocks.0", 0);
        check("", 0);
    }
}
