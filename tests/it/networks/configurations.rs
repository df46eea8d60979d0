//! Configurations that the networks refuse, and that none of them panics.

use std::collections::HashMap;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use sdxl_worker::error::Result;
use sdxl_worker::kernels::Loader;
use sdxl_worker::model::networks::clip::{ClipConfig, ClipTextModel};
use sdxl_worker::model::networks::unet::{Unet, UnetConfig};
use sdxl_worker::model::networks::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use serde_json::{Value, json};

use super::demo_config;

/// The message with which a configuration is refused, by the parser or by `check`.
fn judge(kind: &str, config: &Value) -> Option<String> {
    fn parsed<T: serde::de::DeserializeOwned>(config: &Value, check: impl Fn(&T) -> Result<()>) -> Option<String> {
        match serde_json::from_value::<T>(config.clone()) {
            Ok(config) => check(&config).err().map(|error| {
                assert_eq!(error.code(), "model_unsupported", "{error}");
                error.to_string()
            }),
            Err(error) => Some(error.to_string()),
        }
    }
    match kind {
        "unet" => parsed::<UnetConfig>(config, |config| config.check("mine")),
        "vae" => parsed::<VaeConfig>(config, |config| config.check("mine")),
        _ => parsed::<ClipConfig>(config, |config| config.check("mine")),
    }
}

#[test]
fn unsupported_configurations_are_refused_by_name() {
    let cases = [
        ("unet", "attention_head_dim", json!(0)),
        ("unet", "attention_head_dim", json!([5, 5, 5])),
        ("unet", "attention_head_dim", json!([1, 2])),
        ("unet", "num_attention_heads", json!(7)),
        ("unet", "norm_num_groups", json!(0)),
        ("unet", "norm_num_groups", json!(3)),
        ("unet", "norm_num_groups", json!(null)),
        ("unet", "norm_eps", json!(0)),
        ("unet", "norm_eps", json!(-1.0)),
        ("unet", "block_out_channels", json!([])),
        ("unet", "block_out_channels", json!([0, 0, 0])),
        ("unet", "block_out_channels", json!([u64::MAX, u64::MAX, u64::MAX])),
        ("unet", "block_out_channels", json!([32, 64])),
        ("unet", "layers_per_block", json!(0)),
        ("unet", "layers_per_block", json!(u64::MAX)),
        ("unet", "layers_per_block", json!([1, 2])),
        ("unet", "transformer_layers_per_block", json!(u64::MAX)),
        ("unet", "transformer_layers_per_block", json!([1, 1, [1, 1]])),
        ("unet", "reverse_transformer_layers_per_block", json!([[1], 1, 1])),
        ("unet", "cross_attention_dim", json!(0)),
        ("unet", "cross_attention_dim", json!([96, 96, 64])),
        ("unet", "in_channels", json!(0)),
        ("unet", "out_channels", json!(u64::MAX)),
        ("unet", "conv_in_kernel", json!(4)),
        ("unet", "conv_out_kernel", json!(u64::MAX)),
        ("unet", "freq_shift", json!(16)),
        ("unet", "addition_time_embed_dim", json!(0)),
        ("unet", "addition_time_embed_dim", json!(null)),
        ("unet", "projection_class_embeddings_input_dim", json!(u64::MAX)),
        ("unet", "time_embedding_dim", json!(u64::MAX)),
        ("unet", "addition_embed_type", json!("image")),
        ("unet", "addition_embed_type", json!(null)),
        ("unet", "act_fn", json!("mish")),
        ("unet", "down_block_types", json!(["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"])),
        ("unet", "up_block_types", json!(["UpBlock2D"])),
        ("unet", "mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        ("unet", "mid_block_scale_factor", json!(2.0)),
        ("unet", "only_cross_attention", json!([false, true, false])),
        ("unet", "dual_cross_attention", json!(true)),
        ("unet", "class_embed_type", json!("timestep")),
        ("unet", "encoder_hid_dim_type", json!("ip_image_proj")),
        ("unet", "resnet_time_scale_shift", json!("scale_shift")),
        ("unet", "time_embedding_type", json!("fourier")),
        ("unet", "time_cond_proj_dim", json!(256)),
        ("vae", "block_out_channels", json!([])),
        ("vae", "block_out_channels", json!([0, 0, 0, 0])),
        ("vae", "norm_num_groups", json!(0)),
        ("vae", "norm_num_groups", json!(u64::MAX)),
        ("vae", "layers_per_block", json!(u64::MAX)),
        ("vae", "latent_channels", json!(u64::MAX)),
        ("vae", "scaling_factor", json!(0.0)),
        ("vae", "latents_mean", json!([0.0])),
        ("vae", "latents_std", json!([1.0, 0.0, 1.0, 1.0])),
        ("vae", "down_block_types", json!(vec!["AttnDownEncoderBlock2D"; 4])),
        ("vae", "act_fn", json!("relu")),
        ("text_encoder", "num_attention_heads", json!(0)),
        ("text_encoder", "num_attention_heads", json!(3)),
        ("text_encoder", "hidden_size", json!(u64::MAX)),
        ("text_encoder", "num_hidden_layers", json!(0)),
        ("text_encoder", "vocab_size", json!(u64::MAX)),
        ("text_encoder", "hidden_act", json!("gelu_new")),
        ("text_encoder", "layer_norm_eps", json!(0.0)),
        ("text_encoder", "eos_token_id", json!([1, 2])),
        ("text_encoder", "eos_token_id", json!(null)),
    ];
    for (kind, key, value) in cases {
        let mut config = demo_config(kind);
        assert_eq!(judge(kind, &config), None);
        config[key] = value.clone();
        let message = judge(kind, &config).unwrap_or_else(|| panic!("`{key}`: {value} of {kind} was accepted"));
        assert!(message.contains(&format!("`{key}`")), "{key} = {value}: {message}");
    }
}

#[test]
fn no_configuration_panics() {
    let values = [
        json!(null),
        json!(0),
        json!(1),
        json!(2),
        json!(7),
        json!(-1),
        json!(0.5),
        json!(u64::MAX),
        json!(i64::MAX),
        json!(1u64 << 32),
        json!(1e300),
        json!([]),
        json!([1, 2]),
        json!([0, 0, 0]),
        json!([u64::MAX, 1, 1, 1]),
        json!([[1], [2], []]),
        json!("x"),
        json!(true),
    ];
    let empty = || Loader::from(VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu));
    let mut tried = 0;
    for kind in ["unet", "vae", "text_encoder_2"] {
        let whole = demo_config(kind);
        for key in whole.as_object().unwrap().keys() {
            for value in &values {
                let mut config = whole.clone();
                config[key] = value.clone();
                tried += 1;
                let _ = judge(kind, &config);
                // There are no weights: an accepted configuration must fail at the first of them.
                let loaded = match kind {
                    "unet" => serde_json::from_value(config).ok().map(|c| Unet::load(&empty(), &c).is_ok()),
                    "vae" => serde_json::from_value(config)
                        .ok()
                        .map(|c| VaeEncoder::load(&empty(), &c).is_ok() || VaeDecoder::load(&empty(), &c).is_ok()),
                    _ => serde_json::from_value(config)
                        .ok()
                        .map(|c| ClipTextModel::load(&empty(), &c, true, DType::F32).is_ok()),
                };
                assert_ne!(loaded, Some(true), "{kind} {key} = {value}");
            }
        }
    }
    assert!(tried > 1000, "{tried} configurations");
}
