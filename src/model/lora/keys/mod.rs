//! Matches the keys of an adapter file with the layers of a checkpoint, whichever program wrote them.
//!
//! A module's name is compared with the names of the checkpoint's layers, dots and underscores being equal. If no layer
//! matches, the name is translated first: from the single-file (LDM) names to diffusers', and from OpenCLIP's to
//! transformers'.

pub(crate) mod layer_index;
pub(crate) mod parse;

use std::collections::{BTreeMap, BTreeSet};

pub(crate) use self::layer_index::LayerIndex;
use self::parse::{Key, TargetNetwork, parse_key};
use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::checkpoint::part::Part;
use crate::model::weights::ldm_names::UnetNames;
use crate::model::weights::open::Weights;

/// DoRA's parts, with one number for each output.
const MAGNITUDES: [&str; 2] = ["dora_scale", "lora_magnitude_vector"];

/// Matches an adapter's keys with layers.
pub(crate) struct MatchKeys;

pub(crate) struct MatchTask<'a> {
    pub(crate) adapter: &'a Weights,
    pub(crate) networks: &'a [(Part, LayerIndex)],
    /// Residual blocks of each down block of the UNet.
    pub(crate) layers_per_block: usize,
}

/// The keys of an adapter file by layer.
#[derive(Default)]
pub(crate) struct MatchedKeys {
    /// By network and layer.
    pub(crate) layers: BTreeMap<(Part, String), LayerParts>,
    /// Keys that match no layer of the checkpoint.
    pub(crate) unknown: Vec<String>,
}

/// The parts of one layer's change, by kohya's part names.
pub(crate) type LayerParts = BTreeMap<String, PartRef>;

/// The tensor that holds a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PartRef {
    pub(crate) key: String,
    /// For a fused projection of queries, keys and values: which third of its rows.
    pub(crate) third: Option<usize>,
}

impl Worker<MatchTask<'_>> for MatchKeys {
    type Output = MatchedKeys;

    fn run(&self, task: MatchTask, _: &Context) -> Result<MatchedKeys> {
        let mut matched = MatchedKeys::default();
        let mut indivisible = BTreeSet::new();
        for (key, stored) in task.adapter.tensors() {
            let found = parse_key(key).map(|key| (task.find(&key), key)).filter(|(found, _)| !found.is_empty());
            let Some((found, Key { part, .. })) = found else {
                matched.unknown.push(key.to_owned());
                continue;
            };
            let mut used = false;
            for (network, layer, third) in found {
                // A magnitude per input belongs to the three projections together and cannot be divided.
                if third.is_some() && part == "dora_scale" && stored.shape.first() == Some(&1) {
                    indivisible.insert((network, layer.clone()));
                }
                let parts = matched.layers.entry((network, layer)).or_default();
                // The other parts are common to the three projections.
                let third = third.filter(|_| part.starts_with("lora_up") || MAGNITUDES.contains(&part.as_str()));
                // The first key of a part counts, a second one is skipped.
                if !parts.contains_key(&part) {
                    parts.insert(part.clone(), PartRef { key: key.to_owned(), third });
                    used = true;
                }
            }
            if !used {
                matched.unknown.push(key.to_owned());
            }
        }
        for layer in indivisible {
            let parts = matched.layers.remove(&layer).unwrap_or_default();
            matched.unknown.extend(parts.into_values().map(|part| part.key));
        }
        matched.unknown.sort();
        matched.unknown.dedup();
        Ok(matched)
    }
}

/// A layer of a network, and the third of a fused projection that belongs to it.
type LayerMatch = (Part, String, Option<usize>);

impl MatchTask<'_> {
    fn index(&self, part: Part) -> Option<&LayerIndex> {
        self.networks.iter().find(|(known, _)| *known == part).map(|(_, index)| index)
    }

    /// The layers that a key belongs to: one, three for a fused projection, or none.
    fn find(&self, key: &Key) -> Vec<LayerMatch> {
        let flat = key.module.replace('.', "_");
        let has_first = self.index(Part::TextEncoder).is_some();
        let text = if has_first { Part::TextEncoder } else { Part::TextEncoder2 };
        let networks: &[Part] = match key.target {
            TargetNetwork::Unet => &[Part::Unet],
            TargetNetwork::TextEncoder => &[Part::TextEncoder],
            TargetNetwork::TextEncoder2 => &[Part::TextEncoder2],
            TargetNetwork::AnyTextEncoder => &[text],
            TargetNetwork::Any => &[Part::Unet, text],
        };
        for &part in networks {
            let Some(index) = self.index(part) else { continue };
            let found = match part {
                Part::Unet => unet_layer(index, &flat, self.layers_per_block).map(|layer| vec![(layer, None)]),
                _ => text_layers(index, &flat, &key.part),
            };
            if let Some(found) = found {
                return found.into_iter().map(|(layer, third)| (part, layer.to_owned(), third)).collect();
            }
        }
        Vec::new()
    }
}

/// The UNet's layer with the flat name `flat`.
fn unet_layer<'t>(index: &'t LayerIndex, flat: &str, layers_per_block: usize) -> Option<&'t str> {
    // Keys from diffusers' attention processors have `processor` before the projection, and no index behind `to_out`.
    let plain = flat.replace("_processor_", "_");
    let listed = || index.layer(&format!("{plain}_0")).filter(|_| plain.ends_with("_to_out"));
    let renamed = || {
        let renamed = UnetNames { layers: layers_per_block }.rename(&dotted(flat)?)?;
        Some(renamed.trim_end_matches('.').replace('.', "_"))
    };
    index.layer(&plain).or_else(listed).or_else(|| index.layer(&renamed()?))
}

/// Puts back the dots that the translation of a single-file name reads, and one at the end.
fn dotted(flat: &str) -> Option<String> {
    const WHOLE: [(&str, &str); 6] = [
        ("time_embed_0", "time_embed.0."),
        ("time_embed_2", "time_embed.2."),
        ("label_emb_0_0", "label_emb.0.0."),
        ("label_emb_0_2", "label_emb.0.2."),
        ("out_0", "out.0."),
        ("out_2", "out.2."),
    ];
    const INNER: [(&str, &str); 5] = [
        ("in_layers_0", "in_layers.0"),
        ("in_layers_2", "in_layers.2"),
        ("emb_layers_1", "emb_layers.1"),
        ("out_layers_0", "out_layers.0"),
        ("out_layers_3", "out_layers.3"),
    ];
    if let Some((_, dotted)) = WHOLE.iter().find(|(known, _)| *known == flat) {
        return Some((*dotted).to_owned());
    }
    let inner = |rest: &str| {
        INNER.iter().find(|(known, _)| *known == rest).map_or(rest.to_owned(), |(_, dotted)| (*dotted).to_owned())
    };
    if let Some(rest) = flat.strip_prefix("middle_block_") {
        let (block, rest) = rest.split_once('_')?;
        return Some(format!("middle_block.{block}.{}.", inner(rest)));
    }
    let side = ["input_blocks", "output_blocks"].into_iter().find(|side| flat.starts_with(side))?;
    let (block, rest) = flat.strip_prefix(side)?.strip_prefix('_')?.split_once('_')?;
    match rest.split_once('_') {
        Some((part, rest)) => Some(format!("{side}.{block}.{part}.{}.", inner(rest))),
        None => Some(format!("{side}.{block}.{rest}.")),
    }
}

/// The text encoder's layers with the flat name `flat`, each with its third of a fused projection.
fn text_layers<'t>(index: &'t LayerIndex, flat: &str, part: &str) -> Option<Vec<(&'t str, Option<usize>)>> {
    const OLD: [(&str, &str); 4] = [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")];
    const OPEN_CLIP: [(&str, &str); 6] = [
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("attn_out_proj", "self_attn_out_proj"),
        ("mlp_c_fc", "mlp_fc1"),
        ("mlp_c_proj", "mlp_fc2"),
        ("attn_in_proj", "self_attn"),
    ];
    let inner = flat.strip_prefix("text_model_").unwrap_or(flat);
    let layer = |inner: &str| index.layer(&format!("text_model_{inner}")).or_else(|| index.layer(inner));
    if let Some(found) = layer(inner) {
        return Some(vec![(found, None)]);
    }
    if let Some((old, new)) = OLD.iter().find(|(old, _)| inner.ends_with(&format!("self_attn_{old}"))) {
        return Some(vec![(layer(&format!("{}{new}", inner.strip_suffix(old)?))?, None)]);
    }
    if inner == "ln_final" {
        return Some(vec![(layer("final_layer_norm")?, None)]);
    }
    let (block, rest) = inner.strip_prefix("transformer_resblocks_")?.split_once('_')?;
    let (_, own) = OPEN_CLIP.iter().find(|(known, _)| *known == rest)?;
    let own = format!("encoder_layers_{block}_{own}");
    if rest != "attn_in_proj" {
        return Some(vec![(layer(&own)?, None)]);
    }
    // Only these formats can be divided by rows.
    let divides = matches!(part, "lora_up.weight" | "lora_down.weight" | "alpha") || MAGNITUDES.contains(&part);
    let thirds = ["q_proj", "k_proj", "v_proj"].iter().enumerate();
    let thirds = thirds.map(|(third, name)| Some((layer(&format!("{own}_{name}"))?, Some(third))));
    divides.then(|| thirds.collect::<Option<Vec<_>>>()).flatten()
}

#[cfg(test)]
mod tests {
    use super::{LayerIndex, dotted, text_layers, unet_layer};

    fn index(layers: &[&str]) -> LayerIndex {
        let tensors: Vec<String> = layers.iter().map(|layer| format!("{layer}.weight")).collect();
        LayerIndex::of(tensors.iter().map(|name| (name.as_str(), &[][..])))
    }

    #[test]
    fn names_of_the_single_file_are_found_with_dots_and_underscores() {
        assert_eq!(dotted("input_blocks_4_1_proj_in").unwrap_or_default(), "input_blocks.4.1.proj_in.");
        assert_eq!(dotted("output_blocks_2_1_conv").unwrap_or_default(), "output_blocks.2.1.conv.");
        assert_eq!(dotted("middle_block_0_in_layers_2").unwrap_or_default(), "middle_block.0.in_layers.2.");
        assert_eq!(dotted("input_blocks_0_0").unwrap_or_default(), "input_blocks.0.0.");
        let known = [
            "conv_in",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "down_blocks.0.downsamplers.0.conv",
            "mid_block.resnets.1.conv_shortcut",
        ];
        let index = index(&known);
        for (name, at) in [
            ("input_blocks_0_0", 0),
            ("input_blocks_4_1_transformer_blocks_0_attn1_to_out_0", 1),
            ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0", 1),
            ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_processor_to_out", 1),
            ("input_blocks_3_0_op", 2),
            ("middle_block_2_skip_connection", 3),
        ] {
            assert_eq!(unet_layer(&index, name, 2), Some(known[at]), "{name}");
        }
        assert_eq!(unet_layer(&index, "double_blocks_0_img_attn_qkv", 2), None);
    }

    #[test]
    fn openclip_names_are_found_and_the_fused_projection_is_divided() {
        let attention =
            ["q_proj", "k_proj", "v_proj"].map(|name| format!("text_model.encoder.layers.3.self_attn.{name}"));
        let mut known: Vec<&str> = attention.iter().map(String::as_str).collect();
        known.push("text_model.encoder.layers.3.mlp.fc1");
        let index = index(&known);
        let fused = text_layers(&index, "transformer_resblocks_3_attn_in_proj", "lora_up.weight").unwrap_or_default();
        assert_eq!(fused, vec![(known[0], Some(0)), (known[1], Some(1)), (known[2], Some(2))]);
        assert_eq!(text_layers(&index, "transformer_resblocks_3_mlp_c_fc", "alpha"), Some(vec![(known[3], None)]));
        assert_eq!(
            text_layers(&index, "text_model_encoder_layers_3_self_attn_to_q", "alpha"),
            Some(vec![(known[0], None)])
        );
        assert_eq!(text_layers(&index, "transformer_resblocks_3_attn_in_proj", "lokr_w1"), None);
    }
}
