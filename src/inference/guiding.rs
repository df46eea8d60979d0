//! Guidance from a request: defaults, ranges, and which layers a name means.

use super::guidance::{Guidance, PerturbedAttention, SkippedLayers};
use super::interface::GenerateRequest;
use super::planning::within;
use super::steering::{DynamicThresholding, FreeUWish, SkipLayer};
use crate::error::{Error, Result, nearest};
use crate::model::checkpoint::Checkpoint;
use crate::model::networks::steering::{Change, FreeU, SelfAttention, Stage};

/// Guidance where a request names none.
const CFG_SCALE: f64 = 5.0;
/// Where attention is perturbed if a request does not say.
const PAG_LAYERS: &str = "mid";

/// Decides everything that `request` leaves open about guidance, also in the request itself.
pub(super) fn guidance(request: &mut GenerateRequest, checkpoint: &Checkpoint) -> Result<Guidance> {
    let scale = within("cfg_scale", request.cfg_scale.unwrap_or(CFG_SCALE), 0.0, 100.0)?;
    let rescale = within("guidance_rescale", request.guidance_rescale.unwrap_or(0.0), 0.0, 1.0)?;
    let interval = interval("cfg_interval", request.cfg_interval.unwrap_or([0.0, 1.0]))?;
    let perturbed_attention = perturbed_attention(request, checkpoint)?;
    let thresholding = request.dynamic_thresholding.clone();
    if let Some(thresholding) = &thresholding {
        check_thresholding(thresholding)?;
        if scale <= 1.0 {
            return Err(Error::invalid("dynamic_thresholding", format!("needs `cfg_scale` above 1, got {scale}")));
        }
        if rescale > 0.0 {
            return Err(Error::invalid("guidance_rescale", "cannot be used together with `dynamic_thresholding`"));
        }
    }
    let skipped_layers = request.skip_layer.as_ref().map(|wish| skipped_layers(wish, checkpoint)).transpose()?;
    request.cfg_scale = Some(scale);
    request.guidance_rescale = Some(rescale);
    request.cfg_interval = Some(interval);
    Ok(Guidance {
        scale,
        rescale,
        interval,
        thresholding,
        perturbed_attention,
        skipped_layers: skipped_layers.filter(|skipped| skipped.scale > 0.0),
        freeu: request.freeu.as_ref().map(freeu).transpose()?,
    })
}

fn perturbed_attention(request: &mut GenerateRequest, checkpoint: &Checkpoint) -> Result<Option<PerturbedAttention>> {
    if request.pag_scale.is_none() {
        for (field, given) in [
            ("pag_adaptive_scale", request.pag_adaptive_scale.is_some()),
            ("pag_applied_layers", request.pag_applied_layers.is_some()),
        ] {
            if given {
                return Err(Error::invalid(field, "needs `pag_scale`, which is 0 where it is left out"));
            }
        }
    }
    let scale = within("pag_scale", request.pag_scale.unwrap_or(0.0), 0.0, 100.0)?;
    let adaptive_scale = within("pag_adaptive_scale", request.pag_adaptive_scale.unwrap_or(0.0), 0.0, 100.0)?;
    request.pag_scale = Some(scale);
    if scale == 0.0 {
        return Ok(None);
    }
    request.pag_adaptive_scale = Some(adaptive_scale);
    let layers = request.pag_applied_layers.get_or_insert_with(|| vec![PAG_LAYERS.to_owned()]);
    let change = Change::Within { attention: SelfAttention::Identity, skips_feed_forward: false };
    let blocks = blocks("pag_applied_layers", layers, change, checkpoint)?;
    Ok(Some(PerturbedAttention { scale, adaptive_scale, blocks }))
}

fn skipped_layers(wish: &SkipLayer, checkpoint: &Checkpoint) -> Result<SkippedLayers> {
    let change = match (wish.skip_attention, wish.skip_attention_scores, wish.skip_ff) {
        (true, true, _) => {
            let message = "cannot be used together with `skip_attention`, which is true where it is left out";
            return Err(Error::invalid("skip_layer.skip_attention_scores", message));
        }
        (false, false, false) => return Err(Error::invalid("skip_layer", "must skip something of its layers")),
        (true, false, true) => Change::Skipped,
        (attention, scores, skips_feed_forward) => Change::Within {
            attention: match (attention, scores) {
                (true, _) => SelfAttention::Skipped,
                (false, true) => SelfAttention::Identity,
                (false, false) => SelfAttention::Kept,
            },
            skips_feed_forward,
        },
    };
    Ok(SkippedLayers {
        scale: within("skip_layer.scale", wish.scale, 0.0, 100.0)?,
        interval: [
            within("skip_layer.start", wish.start, 0.0, 1.0)?,
            within("skip_layer.stop", wish.stop, wish.start, 1.0)?,
        ],
        blocks: blocks("skip_layer.layers", &wish.layers, change, checkpoint)?,
    })
}

fn freeu(wish: &FreeUWish) -> Result<FreeU> {
    let stage = |skip: (&str, f64), backbone: (&str, f64)| -> Result<Stage> {
        Ok(Stage { skip: within(skip.0, skip.1, 0.0, 10.0)?, backbone: within(backbone.0, backbone.1, 0.0, 10.0)? })
    };
    let stages =
        [stage(("freeu.s1", wish.s1), ("freeu.b1", wish.b1))?, stage(("freeu.s2", wish.s2), ("freeu.b2", wish.b2))?];
    Ok(FreeU { stages })
}

fn check_thresholding(wish: &DynamicThresholding) -> Result<()> {
    for (field, value, high) in [
        ("mimic_scale", wish.mimic_scale, 100.0),
        ("threshold_percentile", wish.threshold_percentile, 1.0),
        ("mimic_scale_min", wish.mimic_scale_min, 100.0),
        ("cfg_scale_min", wish.cfg_scale_min, 100.0),
        ("sched_val", wish.sched_val, 100.0),
        ("interpolate_phi", wish.interpolate_phi, 1.0),
    ] {
        within(&format!("dynamic_thresholding.{field}"), value, 0.0, high)?;
    }
    Ok(())
}

fn interval(field: &str, [start, end]: [f64; 2]) -> Result<[f64; 2]> {
    if 0.0 <= start && start <= end && end <= 1.0 {
        return Ok([start, end]);
    }
    Err(Error::invalid(field, format!("must be two shares of the steps, 0 to 1, rising, got [{start}, {end}]")))
}

/// `change` at every transformer block of the UNet that one of `layers` names.
fn blocks(field: &str, layers: &[String], change: Change, checkpoint: &Checkpoint) -> Result<Vec<Option<Change>>> {
    let names = checkpoint.unet.transformer_blocks()?;
    if layers.is_empty() {
        return Err(Error::invalid(field, "must name a layer of the UNet, such as `mid`"));
    }
    let mut blocks = vec![None; names.len()];
    for layer in layers {
        let mut found = false;
        for (block, name) in blocks.iter_mut().zip(&names) {
            if names_part(layer, name) {
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

/// Whether `layer` stands in `name`, not within a number of it. Diffusers' older form, `down.block_1.attentions_0`, is
/// understood too.
fn names_part(layer: &str, name: &str) -> bool {
    let layer = layer.replace("down.block_", "down_blocks.").replace("up.block_", "up_blocks.");
    let layer = layer.replace("attentions_", "attentions.");
    let in_number = |end: usize| {
        layer.ends_with(|c: char| c.is_ascii_digit())
            && name.get(end..).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    !layer.is_empty() && name.match_indices(layer.as_str()).any(|(at, _)| !in_number(at + layer.len()))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// How many of the demonstration model's transformer blocks `layer` names.
    fn check(layer: &str, expected: usize) {
        let names = Checkpoint::demo().unwrap().unet.transformer_blocks().unwrap();
        let found = names.iter().filter(|name| names_part(layer, name)).count();
        assert_eq!(found, expected, "`{layer}` in {names:?}");
    }

    #[test]
    fn a_layer_is_named_by_any_part_of_its_name() {
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
