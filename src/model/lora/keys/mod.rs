//! Finds the layers of a checkpoint that an adapter file changes, whoever named its keys.
//!
//! A module's name is compared with the names of the checkpoint's own layers, dots and underscores being alike. What
//! does not fit is renamed first: from the names of the single file to diffusers', and from OpenCLIP's to transformers'.

pub(crate) mod parse;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use self::parse::{Key, Place, split};
use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::checkpoint::Part;
use crate::model::weights::ldm_names::UnetNames;
use crate::model::weights::open::Weights;

/// DoRA's parts, which have a number for each output.
const MAGNITUDES: [&str; 2] = ["dora_scale", "lora_magnitude_vector"];

/// Names the layers of an adapter's keys.
pub(crate) struct Name;

pub(crate) struct NameTask<'a> {
    pub(crate) adapter: &'a Weights,
    pub(crate) networks: &'a [(Part, Table)],
    /// Residual blocks at each resolution of the UNet's way down.
    pub(crate) layers: usize,
}

/// What an adapter file holds.
#[derive(Default)]
pub(crate) struct Named {
    /// By network and layer.
    pub(crate) layers: BTreeMap<(Part, String), Held>,
    /// Keys of no layer of the checkpoint.
    pub(crate) unknown: Vec<String>,
}

/// The parts of one layer's change, by the names that all writers share.
pub(crate) type Held = BTreeMap<String, Source>;

/// Where a part lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// The tensor in the file.
    pub(crate) key: String,
    /// Which third of its rows, where one tensor is for queries, keys and values.
    pub(crate) third: Option<usize>,
}

/// The layers of one network of a checkpoint.
#[derive(Default)]
pub(crate) struct Table {
    /// By name with underscores in place of dots.
    layers: HashMap<String, String>,
    /// Of every tensor.
    shapes: HashMap<String, Vec<usize>>,
}

impl Table {
    pub(crate) fn new(weights: &Weights) -> Self {
        let mut table = Self::default();
        for (name, stored) in weights.tensors() {
            table.shapes.insert(name.to_owned(), stored.shape.clone());
            if let Some((layer, _)) = name.rsplit_once('.') {
                table.layers.insert(layer.replace('.', "_"), layer.to_owned());
            }
        }
        table
    }

    pub(crate) fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.shapes.get(tensor).map(Vec::as_slice)
    }

    /// Whether a name is that of a layer, or of a block of layers.
    pub(crate) fn has_block(&self, name: &str) -> bool {
        self.layers
            .values()
            .any(|layer| layer.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    }

    /// Names of layers and of blocks of layers.
    pub(crate) fn blocks(&self) -> BTreeSet<String> {
        let ends =
            |layer: &String| layer.match_indices('.').map(|(end, _)| end).chain([layer.len()]).collect::<Vec<_>>();
        let of = |layer: &String| {
            ends(layer).into_iter().filter_map(|end| layer.get(..end).map(str::to_owned)).collect::<Vec<_>>()
        };
        self.layers.values().flat_map(of).collect()
    }

    fn layer(&self, flat: &str) -> Option<&str> {
        self.layers.get(flat).map(String::as_str)
    }
}

impl Worker<NameTask<'_>> for Name {
    type Output = Named;

    fn run(&self, task: NameTask, _: &Context) -> Result<Named> {
        let mut named = Named::default();
        let mut whole = BTreeSet::new();
        for (key, stored) in task.adapter.tensors() {
            let found = split(key).map(|key| (task.find(&key), key)).filter(|(found, _)| !found.is_empty());
            let Some((found, Key { part, .. })) = found else {
                named.unknown.push(key.to_owned());
                continue;
            };
            let mut taken = false;
            for (network, layer, third) in found {
                // A magnitude of each input is one of all three: they cannot be told apart.
                if third.is_some() && part == "dora_scale" && stored.shape.first() == Some(&1) {
                    whole.insert((network, layer.clone()));
                }
                let held = named.layers.entry((network, layer)).or_default();
                // What is common to the three is so whole.
                let third = third.filter(|_| part.starts_with("lora_up") || MAGNITUDES.contains(&part.as_str()));
                // A second key of the same part changes nothing.
                if !held.contains_key(&part) {
                    held.insert(part.clone(), Source { key: key.to_owned(), third });
                    taken = true;
                }
            }
            if !taken {
                named.unknown.push(key.to_owned());
            }
        }
        for layer in whole {
            let held = named.layers.remove(&layer).unwrap_or_default();
            named.unknown.extend(held.into_values().map(|source| source.key));
        }
        named.unknown.sort();
        named.unknown.dedup();
        Ok(named)
    }
}

/// A network's layer, and which third of a fused one it is.
type Found = (Part, String, Option<usize>);

impl NameTask<'_> {
    fn table(&self, part: Part) -> Option<&Table> {
        self.networks.iter().find(|(known, _)| *known == part).map(|(_, table)| table)
    }

    /// The layers that a key is of: one, or three for a fused one, or none.
    fn find(&self, key: &Key) -> Vec<Found> {
        let flat = key.module.replace('.', "_");
        let has_first = self.table(Part::TextEncoder).is_some();
        let text = if has_first { Part::TextEncoder } else { Part::TextEncoder2 };
        let places: &[Part] = match key.place {
            Place::Unet => &[Part::Unet],
            Place::First => &[Part::TextEncoder],
            Place::Second => &[Part::TextEncoder2],
            Place::Text => &[text],
            Place::Any => &[Part::Unet, text],
        };
        for &part in places {
            let Some(table) = self.table(part) else { continue };
            let found = match part {
                Part::Unet => of_unet(table, &flat, self.layers).map(|layer| vec![(layer, None)]),
                _ => of_text(table, &flat, &key.part),
            };
            if let Some(found) = found {
                return found.into_iter().map(|(layer, third)| (part, layer.to_owned(), third)).collect();
            }
        }
        Vec::new()
    }
}

/// The UNet's layer that is called `flat`. `layers` is how many residual blocks there are at each resolution.
fn of_unet<'t>(table: &'t Table, flat: &str, layers: usize) -> Option<&'t str> {
    // diffusers' attention processors stood between the attention and its projections, and named the output without its
    // place in a list.
    let plain = flat.replace("_processor_", "_");
    let listed = || table.layer(&format!("{plain}_0")).filter(|_| plain.ends_with("_to_out"));
    let renamed = || {
        let renamed = UnetNames { layers }.rename(&dotted(flat)?)?;
        Some(renamed.trim_end_matches('.').replace('.', "_"))
    };
    table.layer(&plain).or_else(listed).or_else(|| table.layer(&renamed()?))
}

/// The dots of a name of the single file: as many as its renaming reads, and one behind it.
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
        let (place, rest) = rest.split_once('_')?;
        return Some(format!("middle_block.{place}.{}.", inner(rest)));
    }
    let side = ["input_blocks", "output_blocks"].into_iter().find(|side| flat.starts_with(side))?;
    let (block, rest) = flat.strip_prefix(side)?.strip_prefix('_')?.split_once('_')?;
    match rest.split_once('_') {
        Some((part, rest)) => Some(format!("{side}.{block}.{part}.{}.", inner(rest))),
        None => Some(format!("{side}.{block}.{rest}.")),
    }
}

/// The layers of a text encoder that are called `flat`; which third of a fused one each is.
fn of_text<'t>(table: &'t Table, flat: &str, part: &str) -> Option<Vec<(&'t str, Option<usize>)>> {
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
    let layer = |inner: &str| table.layer(&format!("text_model_{inner}")).or_else(|| table.layer(inner));
    if let Some(found) = layer(inner) {
        return Some(vec![(found, None)]);
    }
    if let Some((old, new)) = OLD.iter().find(|(old, _)| inner.ends_with(&format!("self_attn_{old}"))) {
        return Some(vec![(layer(&format!("{}{new}", inner.strip_suffix(old)?))?, None)]);
    }
    if inner == "ln_final" {
        return Some(vec![(layer("final_layer_norm")?, None)]);
    }
    let (place, rest) = inner.strip_prefix("transformer_resblocks_")?.split_once('_')?;
    let (_, own) = OPEN_CLIP.iter().find(|(known, _)| *known == rest)?;
    let own = format!("encoder_layers_{place}_{own}");
    if rest != "attn_in_proj" {
        return Some(vec![(layer(&own)?, None)]);
    }
    // Products have rows that can be told apart; of other changes a third is not a change.
    let divides = matches!(part, "lora_up.weight" | "lora_down.weight" | "alpha") || MAGNITUDES.contains(&part);
    let thirds = ["q_proj", "k_proj", "v_proj"].iter().enumerate();
    let thirds = thirds.map(|(third, name)| Some((layer(&format!("{own}_{name}"))?, Some(third))));
    divides.then(|| thirds.collect::<Option<Vec<_>>>()).flatten()
}

#[cfg(test)]
mod tests {
    use super::{Table, dotted, of_text, of_unet};

    fn table(layers: &[&str]) -> Table {
        let layers = layers.iter().map(|layer| (layer.replace('.', "_"), (*layer).to_owned())).collect();
        Table { layers, ..Table::default() }
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
        let table = table(&known);
        for (name, at) in [
            ("input_blocks_0_0", 0),
            ("input_blocks_4_1_transformer_blocks_0_attn1_to_out_0", 1),
            ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0", 1),
            ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_processor_to_out", 1),
            ("input_blocks_3_0_op", 2),
            ("middle_block_2_skip_connection", 3),
        ] {
            assert_eq!(of_unet(&table, name, 2), Some(known[at]), "{name}");
        }
        assert_eq!(of_unet(&table, "double_blocks_0_img_attn_qkv", 2), None);
    }

    #[test]
    fn openclip_names_are_found_and_the_fused_projection_is_divided() {
        let attention =
            ["q_proj", "k_proj", "v_proj"].map(|name| format!("text_model.encoder.layers.3.self_attn.{name}"));
        let mut known: Vec<&str> = attention.iter().map(String::as_str).collect();
        known.push("text_model.encoder.layers.3.mlp.fc1");
        let table = table(&known);
        let fused = of_text(&table, "transformer_resblocks_3_attn_in_proj", "lora_up.weight").unwrap_or_default();
        assert_eq!(fused, vec![(known[0], Some(0)), (known[1], Some(1)), (known[2], Some(2))]);
        assert_eq!(of_text(&table, "transformer_resblocks_3_mlp_c_fc", "alpha"), Some(vec![(known[3], None)]));
        assert_eq!(
            of_text(&table, "text_model_encoder_layers_3_self_attn_to_q", "alpha"),
            Some(vec![(known[0], None)])
        );
        assert_eq!(of_text(&table, "transformer_resblocks_3_attn_in_proj", "lokr_w1"), None);
    }
}
