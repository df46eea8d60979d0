//! Hostile single-file checkpoints: wrong names, shapes and metadata, foreign files, and swapped networks.

use std::path::Path;

use serde_json::{Value, json};

use super::{Corpus, tensors};
use crate::model::headers;
use crate::single_file::{File, single};

const REFUSED: &[&str] = &["model_corrupt", "model_unsupported"];

pub(super) fn add(corpus: &mut Corpus) {
    for (what, bytes) in headers::all() {
        corpus.checkpoint("header, single file", what, &bytes, headers::codes(what));
    }
    foreign(corpus);
    let sound = single(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo"), 1);
    let mut broken = |what: &str, change: &dyn Fn(&mut File)| {
        let mut file = sound.clone();
        change(&mut file);
        let name = format!("{}.safetensors", corpus.name("single"));
        file.write(&corpus.root().join(&name));
        corpus.ask_model("single file", what, &name, REFUSED);
    };
    let without = |start: &'static str| move |file: &mut File| file.tensors.retain(|name, _| !name.starts_with(start));
    broken("without a UNet", &without("model.diffusion_model."));
    broken("without the last block", &without("model.diffusion_model.output_blocks.5"));
    broken("without the first block", &without("model.diffusion_model.input_blocks.0"));
    broken("without the size embedding", &without("model.diffusion_model.label_emb"));
    broken("without the mid block's first layer", &without("model.diffusion_model.middle_block.0."));
    broken("half a VAE", &without("first_stage_model.decoder.up"));
    broken("half a text encoder", &without("conditioner.embedders.0.transformer.encoder.layers.0"));
    let input = "model.diffusion_model.input_blocks.0.0.weight";
    let shaped = |name: &'static str, shape: &'static [usize]| {
        move |file: &mut File| {
            let bytes = vec![0; shape.iter().product::<usize>() * 2];
            file.tensors.insert(name.to_owned(), ("F16".to_owned(), shape.to_vec(), bytes));
        }
    };
    broken("a first layer without outputs", &shaped(input, &[0, 4, 3, 3]));
    broken("a first layer of 2^40 outputs and no inputs", &shaped(input, &[1 << 40, 0, 3, 3]));
    broken("a first layer of a vector", &shaped(input, &[32]));
    broken("a first layer of a number", &shaped(input, &[]));
    broken("a first layer of 5 inputs", &shaped(input, &[32, 5, 3, 3]));
    broken(
        "a text encoder without words",
        &shaped("conditioner.embedders.0.transformer.embeddings.token_embedding.weight", &[0, 32]),
    );
    broken(
        "a text encoder without width",
        &shaped("conditioner.embedders.0.transformer.embeddings.token_embedding.weight", &[49408, 0]),
    );
    broken("a VAE without outputs", &shaped("first_stage_model.decoder.conv_in.weight", &[0, 0, 0, 0]));
    broken("integers", &|file| {
        file.tensors.get_mut(input).unwrap().0 = "I16".to_owned();
    });
    for (part, pointer, value) in [
        ("unet", "/block_out_channels", json!([1_u64 << 40, 96, 160])),
        ("unet", "/norm_num_groups", json!(0)),
        ("unet", "/attention_head_dim", json!([0, 0, 0])),
        ("unet", "/cross_attention_dim", json!(1_u64 << 40)),
        ("unet", "/layers_per_block", json!(1_u64 << 32)),
        ("text_encoder", "/num_hidden_layers", json!(1_000_000_000)),
        ("text_encoder_2", "/hidden_size", json!(0)),
        ("vae", "/latent_channels", json!(-1)),
        ("scheduler", "/num_train_timesteps", json!(0)),
    ] {
        let lie = |file: &mut File| {
            let text = file.metadata.get_mut(&format!("config.{part}")).unwrap();
            let mut config: Value = serde_json::from_str(text).unwrap();
            *config.pointer_mut(pointer).unwrap() = value.clone();
            *text = config.to_string();
        };
        broken(&format!("{part} told {pointer} {value:.30}"), &lie);
    }
    for text in ["", "null", "[]", "{", "\u{0}", &"[".repeat(100_000)] {
        let lie = |file: &mut File| drop(file.metadata.insert("config.unet".to_owned(), text.to_owned()));
        broken(&format!("unet told {text:.10?}"), &lie);
    }
}

/// Files of other models, and empty ones.
fn foreign(corpus: &mut Corpus) {
    let first = "model.diffusion_model.";
    for (what, keys) in [
        ("no tensors", vec![]),
        ("a prefix alone", vec![first.to_owned()]),
        ("a UNet's last tensor alone", vec![format!("{first}out.2.weight")]),
        ("Stable Diffusion 1", vec!["cond_stage_model.transformer.text_model.final_layer_norm.weight".to_owned()]),
        ("Stable Diffusion 2", vec!["cond_stage_model.model.ln_final.weight".to_owned()]),
        ("Stable Diffusion 3", vec![format!("{first}joint_blocks.0.x_block.attn.qkv.weight")]),
        ("Flux", vec![format!("{first}double_blocks.0.img_attn.qkv.weight")]),
        ("a VAE", vec!["decoder.conv_in.weight".to_owned()]),
        (
            "a huge block number",
            vec![format!("{first}input_blocks.{}.0.weight", u64::MAX), format!("{first}label_emb.0.0.weight")],
        ),
        (
            "a block number that no number holds",
            vec![format!("{first}input_blocks.{}.0.weight", "9".repeat(5000)), format!("{first}label_emb.0.0.weight")],
        ),
        ("a negative block", vec![format!("{first}input_blocks.-1.0.weight"), format!("{first}label_emb.0.0.weight")]),
        ("a long name", vec![format!("{first}{}", "input_blocks.0.".repeat(70_000))]),
        (
            "a size embedding alone",
            vec![format!("{first}label_emb.0.0.weight"), "add_embedding.linear_1.weight".to_owned()],
        ),
        (
            "100 000 blocks",
            (0..100_000)
                .map(|n| format!("{first}input_blocks.{n}.0.in_layers.0.weight"))
                .chain([format!("{first}label_emb.0.0.weight")])
                .collect(),
        ),
        (
            "100 000 transformers",
            (0..100_000)
                .map(|n| format!("{first}middle_block.1.transformer_blocks.{n}.norm1.weight"))
                .chain([format!("{first}label_emb.0.0.weight")])
                .collect(),
        ),
    ] {
        for shape in [vec![1], vec![0, 1 << 40]] {
            let file = tensors(keys.iter().map(|key| (key.as_str(), shape.clone(), 1.0)));
            corpus.checkpoint("foreign single file", &format!("{what}, {shape:?}"), &file, REFUSED);
        }
    }
    for field in ["vae", "unet", "text_encoder", "text_encoder_2"] {
        let instead = |name: &str| json!({ "model": "demo", field: name });
        for (what, file) in [
            ("nothing", tensors([])),
            ("one tensor", tensors([("a", vec![1], 1.0)])),
            ("a LoRA", tensors([("lora_unet_conv_in.lora_up.weight", vec![1], 1.0)])),
            (
                "an empty first layer",
                tensors([("decoder.conv_in.weight", vec![0, 4, 3, 3], 1.0), ("conv_in.weight", vec![0; 4], 1.0)]),
            ),
        ] {
            corpus.file("in place of a part", &format!("{field} of {what}"), "safetensors", file, instead, REFUSED);
        }
        corpus.file("in place of a part", &format!("{field} pickled"), "bin", b"\x80\x02", instead, &["unsafe_format"]);
    }
}
