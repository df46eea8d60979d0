//! The same adapter file under the key namings of other writers.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;

use super::File;

/// diffusers' name of the module of a kohya key, by the demonstration model's own layers.
fn modules() -> HashMap<String, (&'static str, String)> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let mut known = HashMap::new();
    for (part, file, kohya) in [
        ("unet", "unet/diffusion_pytorch_model", "lora_unet"),
        ("text_encoder", "text_encoder/model", "lora_te1"),
        ("text_encoder_2", "text_encoder_2/model", "lora_te2"),
    ] {
        let weights = candle_core::safetensors::load(demo.join(format!("{file}.safetensors")), &Device::Cpu).unwrap();
        for name in weights.keys().filter_map(|name| name.strip_suffix(".weight")) {
            // Text encoders of either generation of transformers: with the model's name before its layers', or without.
            let bare = name.strip_prefix("text_model.").unwrap_or(name);
            for name in [bare.to_owned(), format!("text_model.{bare}")] {
                known.insert(format!("{kohya}_{}", name.replace('.', "_")), (part, name));
            }
        }
    }
    known
}

/// The LDM name of a layer of the demonstration model's UNet, which has one residual block at each resolution.
fn single_file(name: &str) -> String {
    let number = |text: &str| text.parse::<usize>().unwrap();
    let parts: Vec<&str> = name.splitn(5, '.').collect();
    let inner = |rest: &str| match rest {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        _ => panic!("{rest}"),
    };
    match parts[..] {
        ["down_blocks", block, "attentions", _, rest] => format!("input_blocks.{}.1.{rest}", 2 * number(block) + 1),
        ["up_blocks", block, "attentions", place, rest] => {
            format!("output_blocks.{}.1.{rest}", 2 * number(block) + number(place))
        }
        ["down_blocks", block, "resnets", _, rest] => {
            format!("input_blocks.{}.0.{}", 2 * number(block) + 1, inner(rest))
        }
        ["down_blocks", block, "downsamplers", "0", _] => format!("input_blocks.{}.0.op", 2 * number(block) + 2),
        ["up_blocks", block, "resnets", place, rest] => {
            format!("output_blocks.{}.0.{}", 2 * number(block) + number(place), inner(rest))
        }
        ["mid_block", "resnets", place, rest] => format!("middle_block.{}.{}", 2 * number(place), inner(rest)),
        ["mid_block", "attentions", "0", ..] => format!("middle_block.1.{}", name.splitn(4, '.').last().unwrap()),
        _ => panic!("{name}"),
    }
}

/// The kohya file `kohya` by another naming.
pub(super) fn renamed(file: &File, naming: &str) -> File {
    let known = modules();
    let mut all = File::new();
    for (key, tensor) in file {
        let (module, part) = key.split_once('.').unwrap();
        let (network, name) = &known[module];
        let (side, up) = match part {
            "lora_up.weight" => ("B", "up"),
            "lora_down.weight" => ("A", "down"),
            _ => ("", ""),
        };
        // Other writers have no names of their own for these.
        let common = side.is_empty();
        let is_unet = *network == "unet";
        let new = match naming {
            "peft" if !common => format!("{network}.{name}.lora_{side}.weight"),
            "peft-default" if !common => format!("base_model.model.{network}.{name}.lora_{side}.default.weight"),
            "peft" | "peft-default" => format!("{network}.{name}.{part}"),
            "processor" if common => format!("{network}.{name}.{part}"),
            "processor" if is_unet && name.contains(".attn") => {
                let (attention, projection) = name.split_once(".to_").unwrap();
                let projection = projection.strip_suffix(".0").unwrap_or(projection);
                format!("{network}.{attention}.processor.to_{projection}_lora.{up}.weight")
            }
            "processor" if is_unet => format!("{network}.{name}.lora.{up}.weight"),
            "processor" => format!("{network}.{name}.lora_linear_layer.{up}.weight"),
            "single-file" if is_unet => format!("lora_unet_{}.{part}", single_file(name).replace('.', "_")),
            "single-file-dotted" if is_unet => format!("diffusion_model.{}.{part}", single_file(name)),
            "model-dotted" if is_unet => format!("model.diffusion_model.{}.{part}", single_file(name)),
            "single-file" | "single-file-dotted" | "model-dotted" => key.clone(),
            "openclip" if *network == "text_encoder_2" => {
                let rest = name.trim_start_matches("text_model.").strip_prefix("encoder.layers.").unwrap();
                let (place, rest) = rest.split_once('.').unwrap();
                let rest = match rest {
                    "self_attn.out_proj" => "attn_out_proj",
                    "mlp.fc1" => "mlp_c_fc",
                    "mlp.fc2" => "mlp_c_proj",
                    "layer_norm1" => "ln_1",
                    "layer_norm2" => "ln_2",
                    _ => {
                        all.insert(key.clone(), tensor.clone());
                        continue;
                    }
                };
                format!("lora_te2_transformer_resblocks_{place}_{rest}.{part}")
            }
            "openclip" => key.clone(),
            "bare" if is_unet => format!("{name}.{part}"),
            "bare" => key.clone(),
            _ => panic!("{naming}"),
        };
        all.insert(new, tensor.clone());
    }
    all
}

/// Key namings other than kohya's.
pub(super) const NAMINGS: [&str; 8] =
    ["peft", "peft-default", "processor", "single-file", "single-file-dotted", "model-dotted", "openclip", "bare"];
