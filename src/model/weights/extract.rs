//! Extracts one network from a file that may hold several, under diffusers' names.
//!
//! A single file of SDXL holds the UNet, the autoencoder and the text encoders, each with a prefix and the names of its
//! first publication. Parts of such files, and diffusers' and ComfyUI's files of one network, are recognised as well.

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::checkpoint::part::Part;
use crate::model::weights::fp8_scales::{MARK, check, scaled_by};
use crate::model::weights::ldm_names::{UnetNames, number};
use crate::model::weights::open::{Stored, Weights};

/// A tensor that identifies a network and the kind of its names, and the prefixes that it may have.
struct Marked {
    mark: &'static str,
    prefixes: &'static [&'static str],
    names: Names,
}

#[derive(Clone, Copy)]
enum Names {
    /// diffusers' and transformers'
    Own,
    Unet,
    Vae,
    OpenClip,
}

const UNET: &[&str] = &["model.diffusion_model.", "diffusion_model.", "unet.", ""];
const VAE: &[&str] = &["first_stage_model.", "vae.", ""];
const CLIP: &[&str] = &["conditioner.embedders.0.transformer.", "text_encoder.", "clip_l.transformer.", ""];
const BIG_CLIP: &[&str] = &["conditioner.embedders.1.transformer.", "text_encoder_2.", "clip_g.transformer.", ""];
/// The refiner's only encoder is the first one.
const OPEN_CLIP: &[&str] = &["conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "clip_g.", ""];

const WORDS: &str = "text_model.embeddings.token_embedding.weight";
/// The name in files of transformers since version 5.
const BARE_WORDS: &str = "embeddings.token_embedding.weight";

fn marks(part: Part) -> &'static [Marked] {
    match part {
        Part::Unet => &[
            Marked { mark: "input_blocks.0.0.weight", prefixes: UNET, names: Names::Unet },
            Marked { mark: "conv_in.weight", prefixes: UNET, names: Names::Own },
        ],
        Part::Vae => &[
            Marked { mark: "decoder.mid.block_1.norm1.weight", prefixes: VAE, names: Names::Vae },
            Marked { mark: "decoder.conv_in.weight", prefixes: VAE, names: Names::Own },
        ],
        Part::TextEncoder => &[
            Marked { mark: WORDS, prefixes: CLIP, names: Names::Own },
            Marked { mark: BARE_WORDS, prefixes: CLIP, names: Names::Own },
        ],
        Part::TextEncoder2 => &[
            Marked { mark: "ln_final.weight", prefixes: OPEN_CLIP, names: Names::OpenClip },
            Marked { mark: WORDS, prefixes: BIG_CLIP, names: Names::Own },
            Marked { mark: BARE_WORDS, prefixes: BIG_CLIP, names: Names::Own },
        ],
    }
}

/// Renames one part to diffusers' names; a network without a known mark stays as it is.
pub(crate) struct NamePart(pub(crate) Part);

impl Worker<Weights> for NamePart {
    type Output = Weights;

    /// # Errors
    /// `model_corrupt` if two tensors would have one name; `model_unsupported` for scales without a weight.
    fn run(&self, weights: Weights, _: &Context) -> Result<Weights> {
        named(&weights, self.0).unwrap_or(Ok(weights))
    }
}

/// The tensors of a part, by diffusers' names; `None` if there is no such part.
pub(crate) fn named(weights: &Weights, part: Part) -> Option<Result<Weights>> {
    let has = |prefix: &str, mark: &str| weights.has(&format!("{prefix}{mark}"));
    let found = |marked: &'static Marked| {
        let prefix = marked.prefixes.iter().find(|prefix| has(prefix, marked.mark))?;
        Some((*prefix, marked.names))
    };
    let (prefix, names) = marks(part).iter().find_map(found)?;
    let own = || weights.tensors().filter_map(|(name, _)| name.strip_prefix(prefix));
    let marked = own().any(|name| name == MARK);
    let renamed = match names {
        Names::Own => weights.renamed(|name| name.strip_prefix(prefix).map(str::to_owned)),
        Names::Unet => {
            let names = UnetNames::of(own());
            weights.renamed(|name| names.rename(name.strip_prefix(prefix)?))
        }
        Names::Vae => {
            let level = |name: &str| Some(number(name.strip_prefix("decoder.up.")?)?.0);
            let last = own().filter_map(level).max().unwrap_or(0);
            weights.renamed(|name| vae(name.strip_prefix(prefix)?, last))
        }
        Names::OpenClip => {
            weights.relaid(|name, stored| name.strip_prefix(prefix).map_or(Vec::new(), |name| open_clip(name, stored)))
        }
    };
    Some(renamed.and_then(|renamed| check(&renamed, marked).map(|()| renamed)))
}

/// A name of the autoencoder, whose way up ends at level `last` as it begins: single files count it from the image.
fn vae(name: &str, last: usize) -> Option<String> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(name.to_owned());
    }
    let (half, rest) = name.split_once('.').filter(|(half, _)| matches!(*half, "encoder" | "decoder"))?;
    let simple = [
        ("conv_in.", "conv_in."),
        ("conv_out.", "conv_out."),
        ("norm_out.", "conv_norm_out."),
        ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
        ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
        ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
        ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
        ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ];
    if let Some((new, rest)) = simple.iter().find_map(|(old, new)| Some((new, rest.strip_prefix(old)?))) {
        return Some(format!("{half}.{new}{rest}"));
    }
    let resnet = |rest: &str| match rest.strip_prefix("nin_shortcut.") {
        Some(rest) => format!("conv_shortcut.{rest}"),
        None => rest.to_owned(),
    };
    if let Some(rest) = rest.strip_prefix("mid.") {
        let (i, rest) = match (rest.strip_prefix("block_1."), rest.strip_prefix("block_2.")) {
            (Some(rest), _) => (0, rest),
            (_, Some(rest)) => (1, rest),
            (None, None) => return None,
        };
        return Some(format!("{half}.mid_block.resnets.{i}.{}", resnet(rest)));
    }
    let (way, (old, new), (level, rest)) = match (rest.strip_prefix("down."), rest.strip_prefix("up.")) {
        (Some(rest), _) => ("down_blocks", ("downsample.", "downsamplers.0."), number(rest)?),
        (_, Some(rest)) => ("up_blocks", ("upsample.", "upsamplers.0."), number(rest)?),
        (None, None) => return None,
    };
    let block = if way == "up_blocks" { last.checked_sub(level)? } else { level };
    if let Some(rest) = rest.strip_prefix(old) {
        return Some(format!("{half}.{way}.{block}.{new}{rest}"));
    }
    let (layer, rest) = number(rest.strip_prefix("block.")?)?;
    Some(format!("{half}.{way}.{block}.resnets.{layer}.{}", resnet(rest)))
}

/// transformers' tensors of one of OpenCLIP's.
fn open_clip(name: &str, stored: &Stored) -> Vec<(String, Stored)> {
    let named = name.replace("in_proj.", "in_proj_");
    if let Some((weight, ending)) = scaled_by(&named) {
        // One number, which applies to each part of its weight.
        let names = open_clip_names(&weight).into_iter();
        let scale = |name: String| Some((format!("{}{ending}", name.strip_suffix("weight")?), stored.clone()));
        return names.filter_map(scale).collect();
    }
    let names = open_clip_names(name);
    match names.len() {
        1 => names.into_iter().map(|name| (name, stored.clone())).collect(),
        _ => names.into_iter().zip(thirds(stored)).collect(),
    }
}

/// The names of these tensors: one, or three for its parts.
fn open_clip_names(name: &str) -> Vec<String> {
    let simple = [
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("ln_final.weight", "text_model.final_layer_norm.weight"),
        ("ln_final.bias", "text_model.final_layer_norm.bias"),
        // Without `.weight`: the matrix is transposed, which the network expects of this name.
        ("text_projection", "text_projection"),
        ("text_projection.weight", "text_projection.weight"),
    ];
    if let Some((_, new)) = simple.iter().find(|(old, _)| *old == name) {
        return vec![(*new).to_owned()];
    }
    let Some((layer, rest)) = name.strip_prefix("transformer.resblocks.").and_then(number) else { return Vec::new() };
    let renamed = |rest: &str| format!("text_model.encoder.layers.{layer}.{rest}");
    // One matrix for queries, keys and values, one below the other.
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let name = |projection: &str| renamed(&format!("self_attn.{projection}.{kind}"));
        return ["q_proj", "k_proj", "v_proj"].map(name).into();
    }
    let parts = [
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("attn.out_proj.", "self_attn.out_proj."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    ];
    let renamed =
        parts.iter().find_map(|(old, new)| rest.strip_prefix(old).map(|rest| renamed(&format!("{new}{rest}"))));
    renamed.into_iter().collect()
}

/// A tensor's rows in three parts; none if they are no multiple of three.
fn thirds(stored: &Stored) -> Vec<Stored> {
    let (Some((&rows, rest)), bytes) = (stored.shape.split_first(), stored.range.end - stored.range.start) else {
        return Vec::new();
    };
    if !rows.is_multiple_of(3) || !bytes.is_multiple_of(3) {
        return Vec::new();
    }
    let part = |i: u64| {
        let start = stored.range.start + i * (bytes / 3);
        let shape = [&[rows / 3], rest].concat();
        Stored { dtype: stored.dtype, shape, range: start..start + bytes / 3 }
    };
    (0..3).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::{Stored, open_clip};
    use crate::model::weights::open::StoredDtype;

    #[test]
    fn queries_keys_and_values_share_the_scale_of_their_matrix() {
        let scale = Stored { dtype: StoredDtype::F32, shape: vec![], range: 8..12 };
        let q = |ending: &str| format!("text_model.encoder.layers.3.self_attn.q_proj.{ending}");
        for (name, ending) in [
            ("attn.in_proj_scale_weight", "scale_weight"),
            ("attn.in_proj.scale_weight", "scale_weight"),
            ("attn.in_proj_weight_scale", "weight_scale"),
        ] {
            let made = open_clip(&format!("transformer.resblocks.3.{name}"), &scale);
            let expected = ["q_proj", "k_proj", "v_proj"].map(|part| q(ending).replace("q_proj", part));
            assert!(made.iter().map(|(name, _)| name).eq(&expected), "{made:?}");
            assert!(made.iter().all(|(_, stored)| stored.range == scale.range), "{made:?}");
        }
        let one = open_clip("transformer.resblocks.3.mlp.c_fc.scale_weight", &scale);
        assert_eq!(
            one.first().map(|(name, _)| name.as_str()),
            Some("text_model.encoder.layers.3.mlp.fc1.scale_weight")
        );
        let matrix = Stored { shape: vec![6, 2], range: 0..48, ..scale };
        let parts = open_clip("transformer.resblocks.3.attn.in_proj_weight", &matrix);
        assert!(parts.iter().map(|(_, part)| part.range.clone()).eq([0..16, 16..32, 32..48]), "{parts:?}");
    }
}
