//! What the keys of adapter files say by themselves: of which network, which of its modules, and which part of the change.
//!
//! The writers: kohya's sd-scripts (`lora_unet_…`, `lora_te1_…`), PEFT (`….lora_A.weight`), diffusers before PEFT
//! (`….processor.to_q_lora.down.weight`), LyCORIS (`….hada_w1_a`, `….lokr_w1`, …), and programs that keep the names of the
//! single file (`diffusion_model.input_blocks.4.1.…`).

use crate::model::lora::formats::ADAPTERS;

/// The network that a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Unet,
    First,
    Second,
    /// The text encoder, as if there were one.
    Text,
    /// No network is named.
    Any,
}

/// A key, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Key<'a> {
    pub(crate) place: Place,
    /// The module's name, with dots or underscores.
    pub(crate) module: &'a str,
    /// By the name that all writers share.
    pub(crate) part: String,
}

/// How keys end in which the module's name is followed by what several writers call otherwise.
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

/// How keys begin.
const BEGINNINGS: &[(&str, Place)] = &[
    ("lora_unet_", Place::Unet),
    ("lora_unet.", Place::Unet),
    ("oft_unet_", Place::Unet),
    ("lycoris_unet_", Place::Unet),
    ("lora_te1_", Place::First),
    ("lora_te2_", Place::Second),
    ("lora_te_", Place::Text),
    ("oft_te1_", Place::First),
    ("oft_te2_", Place::Second),
    ("lycoris_", Place::Any),
    ("model.diffusion_model.", Place::Unet),
    ("diffusion_model.", Place::Unet),
    ("unet.", Place::Unet),
    ("text_encoder_2.", Place::Second),
    ("text_encoder.", Place::First),
    ("conditioner.embedders.0.transformer.", Place::First),
    ("conditioner.embedders.1.model.", Place::Second),
    ("text_encoders.clip_l.transformer.", Place::First),
    ("text_encoders.clip_g.transformer.", Place::Second),
    ("clip_l.transformer.", Place::First),
    ("clip_g.transformer.", Place::Second),
    ("clip_l.", Place::First),
    ("clip_g.", Place::Second),
    ("te1.", Place::First),
    ("te2.", Place::Second),
];

/// Takes a key apart; `None` where its end is no part of a change.
pub(crate) fn split(key: &str) -> Option<Key<'_>> {
    let (module, part) = ending(key)?;
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    let (place, module) = BEGINNINGS
        .iter()
        .find_map(|(beginning, place)| Some((*place, module.strip_prefix(beginning)?)))
        .unwrap_or((Place::Any, module));
    // PEFT's own prefix may stand behind the network's.
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    (!module.is_empty()).then_some(Key { place, module, part })
}

/// The module's name, and the part's.
fn ending(key: &str) -> Option<(&str, String)> {
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
        // One part's name may end as another's.
        let parts = ADAPTERS.iter().flat_map(|(_, format)| format.parts);
        let of = |part: &&'static str| Some((key.strip_suffix(*part)?.strip_suffix('.')?, *part));
        let (module, part) = parts.filter_map(of).max_by_key(|(_, part)| part.len())?;
        Some((module, part.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::{Place, split};

    #[track_caller]
    fn check(key: &str, place: Place, module: &str, part: &str) {
        let got = split(key).map(|key| (key.place, key.module.to_owned(), key.part));
        assert_eq!(got, Some((place, module.to_owned(), part.to_owned())), "{key}");
    }

    #[test]
    fn keys_of_every_writer_are_taken_apart() {
        check(
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
            Place::Unet,
            "input_blocks_4_1_proj_in",
            "lora_down.weight",
        );
        check(
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
            Place::Second,
            "text_model_encoder_layers_0_mlp_fc1",
            "alpha",
        );
        check(
            "base_model.model.unet.mid_block.attentions.0.proj_in.lora_B.weight",
            Place::Unet,
            "mid_block.attentions.0.proj_in",
            "lora_up.weight",
        );
        check("unet.conv_in.lora_A.default.weight", Place::Unet, "conv_in", "lora_down.weight");
        check(
            "unet.a.attn1.processor.to_q_lora.down.weight",
            Place::Unet,
            "a.attn1.processor.to_q",
            "lora_down.weight",
        );
        check(
            "text_encoder.text_model.x.q_proj.lora_linear_layer.up.weight",
            Place::First,
            "text_model.x.q_proj",
            "lora_up.weight",
        );
        check("unet.a.to_q.lora_magnitude_vector.default.weight", Place::Unet, "a.to_q", "lora_magnitude_vector");
        check("diffusion_model.out.2.lora_up.weight", Place::Unet, "out.2", "lora_up.weight");
        check("down_blocks.0.resnets.0.conv1.diff_b", Place::Any, "down_blocks.0.resnets.0.conv1", "diff_b");
        check("lora_unet_a_to_k.weight", Place::Unet, "a_to_k", "weight");
        check("lora_unet_a_to_k.hada_w1_a", Place::Unet, "a_to_k", "hada_w1_a");
        assert_eq!(split("emb_params"), None);
    }
}
