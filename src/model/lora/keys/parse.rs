//! Takes an adapter key apart: network, module and part of the change.
//!
//! The writers: kohya's sd-scripts (`lora_unet_…`, `lora_te1_…`), PEFT (`….lora_A.weight`), diffusers before PEFT
//! (`….processor.to_q_lora.down.weight`), LyCORIS (`….hada_w1_a`, `….lokr_w1`, …), and programs that keep the names of the
//! single file (`diffusion_model.input_blocks.4.1.…`).

use crate::model::lora::formats::ADAPTERS;

/// The network that a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TargetNetwork {
    Unet,
    TextEncoder,
    TextEncoder2,
    /// The only text encoder of the checkpoint, or the first of two.
    AnyTextEncoder,
    /// The key names no network.
    Any,
}

/// A key, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Key<'a> {
    pub(crate) target: TargetNetwork,
    /// The module's name, with dots or underscores.
    pub(crate) module: &'a str,
    /// Under kohya's name for it.
    pub(crate) part: String,
}

/// Endings of other writers, and kohya's name for the part.
const ENDINGS: &[(&str, &str)] = &[
    (".lora_linear_layer.down.weight", "lora_down.weight"),
    (".lora_linear_layer.up.weight", "lora_up.weight"),
    (".lora_linear_layer.alpha", "alpha"),
    (".lora.down.weight", "lora_down.weight"),
    (".lora.up.weight", "lora_up.weight"),
    (".lora.alpha", "alpha"),
    ("_lora.down.weight", "lora_down.weight"),
    ("_lora.up.weight", "lora_up.weight"),
    ("_lora.alpha", "alpha"),
    (".lora_A.weight", "lora_down.weight"),
    (".lora_B.weight", "lora_up.weight"),
    (".lora_A", "lora_down.weight"),
    (".lora_B", "lora_up.weight"),
    (".lora_B.bias", "lora_up.bias"),
    (".lora_magnitude_vector.weight", "lora_magnitude_vector"),
];

/// Prefixes of keys, and the network that each names.
const PREFIXES: &[(&str, TargetNetwork)] = &[
    ("lora_unet_", TargetNetwork::Unet),
    ("lora_unet.", TargetNetwork::Unet),
    ("oft_unet_", TargetNetwork::Unet),
    ("lycoris_unet_", TargetNetwork::Unet),
    ("lora_te1_", TargetNetwork::TextEncoder),
    ("lora_te2_", TargetNetwork::TextEncoder2),
    ("lora_te_", TargetNetwork::AnyTextEncoder),
    ("oft_te1_", TargetNetwork::TextEncoder),
    ("oft_te2_", TargetNetwork::TextEncoder2),
    ("lycoris_", TargetNetwork::Any),
    ("model.diffusion_model.", TargetNetwork::Unet),
    ("diffusion_model.", TargetNetwork::Unet),
    ("unet.", TargetNetwork::Unet),
    ("text_encoder_2.", TargetNetwork::TextEncoder2),
    ("text_encoder.", TargetNetwork::TextEncoder),
    ("conditioner.embedders.0.transformer.", TargetNetwork::TextEncoder),
    ("conditioner.embedders.1.model.", TargetNetwork::TextEncoder2),
    ("text_encoders.clip_l.transformer.", TargetNetwork::TextEncoder),
    ("text_encoders.clip_g.transformer.", TargetNetwork::TextEncoder2),
    ("clip_l.transformer.", TargetNetwork::TextEncoder),
    ("clip_g.transformer.", TargetNetwork::TextEncoder2),
    ("clip_l.", TargetNetwork::TextEncoder),
    ("clip_g.", TargetNetwork::TextEncoder2),
    ("te1.", TargetNetwork::TextEncoder),
    ("te2.", TargetNetwork::TextEncoder2),
];

/// Takes a key apart; `None` if its ending is no part of a change.
pub(crate) fn parse_key(key: &str) -> Option<Key<'_>> {
    let (module, part) = split_part(key)?;
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    let (target, module) = PREFIXES
        .iter()
        .find_map(|(prefix, target)| Some((*target, module.strip_prefix(prefix)?)))
        .unwrap_or((TargetNetwork::Any, module));
    // PEFT's prefix may follow the network's.
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    (!module.is_empty()).then_some(Key { target, module, part })
}

/// Splits a key into the names of the module and of the part.
fn split_part(key: &str) -> Option<(&str, String)> {
    // PEFT names the adapter between the part and its tensor: `lora_A.default.weight`.
    for (middle, part) in [(".lora_A.", "lora_down."), (".lora_B.", "lora_up.")] {
        if let Some((module, (_, tensor))) =
            key.split_once(middle).and_then(|(m, rest)| Some((m, rest.split_once('.')?)))
            && matches!(tensor, "weight" | "bias")
        {
            return Some((module, format!("{part}{tensor}")));
        }
    }
    if let Some((module, rest)) = key.split_once(".lora_magnitude_vector.")
        && rest.split('.').count() <= 2
    {
        return Some((module, "lora_magnitude_vector".to_owned()));
    }
    let key = key.strip_suffix(".default").unwrap_or(key);
    let known = ENDINGS.iter().find_map(|(end, part)| Some((key.strip_suffix(end)?, (*part).to_owned())));
    known.or_else(|| {
        // The longest match counts: one part's name may end with another's.
        let parts = ADAPTERS.iter().flat_map(|(_, format)| format.parts);
        let split = |part: &&'static str| Some((key.strip_suffix(*part)?.strip_suffix('.')?, *part));
        let (module, part) = parts.filter_map(split).max_by_key(|(_, part)| part.len())?;
        Some((module, part.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::{TargetNetwork, parse_key};

    #[track_caller]
    fn check(key: &str, target: TargetNetwork, module: &str, part: &str) {
        let got = parse_key(key).map(|key| (key.target, key.module.to_owned(), key.part));
        assert_eq!(got, Some((target, module.to_owned(), part.to_owned())), "{key}");
    }

    #[test]
    fn keys_of_every_writer_are_taken_apart() {
        check(
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
            TargetNetwork::Unet,
            "input_blocks_4_1_proj_in",
            "lora_down.weight",
        );
        check(
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
            TargetNetwork::TextEncoder2,
            "text_model_encoder_layers_0_mlp_fc1",
            "alpha",
        );
        check(
            "base_model.model.unet.mid_block.attentions.0.proj_in.lora_B.weight",
            TargetNetwork::Unet,
            "mid_block.attentions.0.proj_in",
            "lora_up.weight",
        );
        check("unet.conv_in.lora_A.default.weight", TargetNetwork::Unet, "conv_in", "lora_down.weight");
        check(
            "unet.a.attn1.processor.to_q_lora.down.weight",
            TargetNetwork::Unet,
            "a.attn1.processor.to_q",
            "lora_down.weight",
        );
        check(
            "text_encoder.text_model.x.q_proj.lora_linear_layer.up.weight",
            TargetNetwork::TextEncoder,
            "text_model.x.q_proj",
            "lora_up.weight",
        );
        check(
            "unet.a.to_q.lora_magnitude_vector.default.weight",
            TargetNetwork::Unet,
            "a.to_q",
            "lora_magnitude_vector",
        );
        check("diffusion_model.out.2.lora_up.weight", TargetNetwork::Unet, "out.2", "lora_up.weight");
        check("down_blocks.0.resnets.0.conv1.diff_b", TargetNetwork::Any, "down_blocks.0.resnets.0.conv1", "diff_b");
        check("lora_unet_a_to_k.weight", TargetNetwork::Unet, "a_to_k", "weight");
        check("lora_unet_a_to_k.hada_w1_a", TargetNetwork::Unet, "a_to_k", "hada_w1_a");
        assert_eq!(parse_key("emb_params"), None);
    }
}
