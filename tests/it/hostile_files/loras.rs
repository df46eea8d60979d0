//! Adapter files of every format that do not fit, claim too much, or match no layer of the model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};

use super::{Corpus, tensors};
use crate::model::headers;

const REFUSED: &[&str] = &["model_unsupported"];
const LAYERS: [&str; 4] = [
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_down_blocks_1_attentions_0_norm",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
];

fn lora(name: &str) -> Value {
    json!({ "loras": [{ "name": name }] })
}

/// The tensors of an adapted layer: name, shape and fill value.
type Held<'a> = [(&'a str, &'a [usize], f32)];

pub(super) fn add(corpus: &mut Corpus) {
    for (what, bytes) in headers::all() {
        corpus.file("header, LoRA", what, "safetensors", bytes, lora, headers::codes(what));
    }
    for (what, keys) in [
        ("no keys", vec![]),
        ("keys of nothing", vec!["a", "b.c", "lora_unet_", "lora_unet_.alpha", ".lora_up.weight", "lora_up.weight"]),
        ("layers that are not there", vec!["lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight"]),
        ("a Flux LoRA's keys", vec!["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"]),
        ("an alpha alone", vec!["lora_unet_conv_in.alpha"]),
        ("a DoRA scale alone", vec!["lora_unet_conv_in.dora_scale"]),
    ] {
        let file = tensors(keys.into_iter().map(|key| (key, vec![1], 1.0)));
        corpus.file("LoRA", what, "safetensors", file, lora, REFUSED);
    }
    let many: Vec<String> = (0..50_000).map(|n| format!("lora_unet_down_blocks_{n}_proj_in.lora_up.weight")).collect();
    let many = tensors(many.iter().map(|key| (key.as_str(), vec![1, 1], 1.0)));
    corpus.file("LoRA", "50 000 layers that are not there", "safetensors", many, lora, REFUSED);
    let long = format!("lora_unet_{}.lora_up.weight", "down_blocks_".repeat(80_000));
    corpus.file("LoRA", "a long name", "safetensors", tensors([(long.as_str(), vec![1, 1], 1.0)]), lora, REFUSED);
    of_other_layers(corpus);
    let (up, down) = ("lora_up.weight", "lora_down.weight");
    let misfits: &[(&str, &Held)] = &[
        ("without a down", &[(up, &[96, 4], 0.1)]),
        ("without an up", &[(down, &[4, 96], 0.1)]),
        ("of rank 0", &[(up, &[96, 0], 0.1), (down, &[0, 96], 0.1)]),
        ("of 2^40 empty ranks", &[(up, &[0, 1 << 40], 0.1), (down, &[1 << 40, 0], 0.1)]),
        ("of 2^60 outputs", &[(up, &[1 << 60, 0], 0.1), (down, &[0, 1 << 60], 0.1)]),
        ("of two ranks", &[(up, &[96, 4], 0.1), (down, &[5, 96], 0.1)]),
        ("exchanged", &[(up, &[4, 96], 0.1), (down, &[96, 4], 0.1)]),
        ("of vectors", &[(up, &[96], 0.1), (down, &[96], 0.1)]),
        ("of numbers", &[(up, &[], 0.1), (down, &[], 0.1)]),
        ("whose product is huge", &[(up, &[30_000, 1], 0.1), (down, &[1, 30_000], 0.1)]),
        ("that is not a number", &[(up, &[96, 4], f32::NAN), (down, &[4, 96], 0.1)]),
        ("that is infinite", &[(up, &[96, 4], 0.1), (down, &[4, 96], f32::INFINITY)]),
        ("with alpha not a number", &[(up, &[96, 4], 0.1), (down, &[4, 96], 0.1), ("alpha", &[], f32::NAN)]),
        ("with many alphas", &[(up, &[96, 4], 0.1), (down, &[4, 96], 0.1), ("alpha", &[4], 1.0)]),
        ("with no alpha in it", &[(up, &[96, 4], 0.1), (down, &[4, 96], 0.1), ("alpha", &[0], 1.0)]),
        (
            "with a core of nothing",
            &[(up, &[96, 4], 0.1), (down, &[4, 96], 0.1), ("lora_mid.weight", &[0, 4, 3, 3], 0.1)],
        ),
        ("with magnitudes of another", &[(up, &[96, 4], 0.1), (down, &[4, 96], 0.1), ("dora_scale", &[7, 1], 0.1)]),
        ("LoHa of nothing", &[("hada_w1_a", &[0, 0], 0.1), ("hada_w1_b", &[0, 0], 0.1)]),
        ("LoHa, one half", &[("hada_w1_a", &[96, 4], 0.1), ("hada_w1_b", &[4, 96], 0.1)]),
        ("LoKr that is huge", &[("lokr_w1", &[3000, 300], 0.1), ("lokr_w2", &[300, 3000], 0.1)]),
        ("LoKr of one factor", &[("lokr_w1", &[96, 96], 0.1)]),
        ("OFT of one huge block", &[("oft_blocks", &[1, 700, 700], 0.1)]),
        ("OFT of no blocks", &[("oft_blocks", &[0, 96, 96], 0.1)]),
        ("BOFT of 40 stages", &[("oft_blocks", &[40, 24, 4, 4], 0.1)]),
        ("IA3 without values", &[("on_input", &[], 1.0)]),
        ("GLoRA of another rank", &[("a1.weight", &[96, 4], 0.1), ("a2.weight", &[5, 96], 0.1)]),
        ("a difference of another shape", &[("diff", &[95, 96], 0.1)]),
        ("a difference not a number", &[("diff", &[96, 96], f32::NAN)]),
        ("a bias of another", &[("diff_b", &[97], 0.1)]),
    ];
    for (what, held) in misfits {
        let bytes = named(LAYERS[0], held.iter().map(|(part, shape, value)| (*part, shape.to_vec(), *value)));
        corpus.file("LoRA", what, "safetensors", bytes, lora, REFUSED);
    }
    claims(corpus);
}

fn named<'a>(layer: &str, held: impl Iterator<Item = (&'a str, Vec<usize>, f32)>) -> Vec<u8> {
    let held: Vec<_> = held.map(|(part, shape, value)| (format!("{layer}.{part}"), shape, value)).collect();
    tensors(held.iter().map(|(name, shape, value)| (name.as_str(), shape.clone(), *value)))
}

/// The goldens of the formats, for layers of 16×12.
fn of_other_layers(corpus: &mut Corpus) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapters/formulas.safetensors");
    let mut cases: BTreeMap<_, Vec<(String, Vec<usize>)>> = BTreeMap::new();
    for (name, tensor) in candle_core::safetensors::load(path, &Device::Cpu).unwrap() {
        if let [case, kind, "part", part] = name.split('/').collect::<Vec<_>>()[..] {
            let held = cases.entry((case.to_owned(), kind.to_owned())).or_default();
            held.push((part.to_owned(), tensor.dims().to_vec()));
        }
    }
    for (number, ((case, kind), held)) in cases.iter().enumerate() {
        let bytes = named(LAYERS[number % 4], held.iter().map(|(part, shape)| (part.as_str(), shape.clone(), 0.5)));
        let what = format!("{case}, {kind}, for another layer");
        corpus.file("formats", &what, "safetensors", bytes, lora, REFUSED);
    }
}

/// Tensors that claim a terabyte, in a sparse file.
fn claims(corpus: &mut Corpus) {
    for part in ["lora_up.weight", "hada_w1_a", "lokr_w1", "oft_blocks", "diff", "w_norm", "diff_b"] {
        let shape = if part == "oft_blocks" { vec![1 << 10, 1 << 14, 1 << 15] } else { vec![1_u64 << 20, 1 << 19] };
        let entry = json!({ "dtype": "F16", "shape": shape, "data_offsets": [0, 1_u64 << 40] });
        let mut header = serde_json::Map::new();
        header.insert(format!("{}.{part}", LAYERS[0]), entry);
        let bytes = headers::safetensors(&Value::from(header).to_string(), 0);
        let length = bytes.len() as u64 + (1 << 40);
        corpus.sparse(("LoRA", &format!("{part} of a terabyte")), "safetensors", &bytes, length, lora, REFUSED);
    }
}
