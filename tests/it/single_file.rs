//! Writes single files: converts a diffusers folder to LDM and OpenCLIP names.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Number format, shape, bytes.
pub(crate) type Stored = (String, Vec<usize>, Vec<u8>);

/// A safetensors file in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct File {
    pub(crate) tensors: BTreeMap<String, Stored>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl File {
    pub(crate) fn read(path: &Path) -> Self {
        let file = fs::read(path).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let data = &file[8 + length..];
        let mut tensors = BTreeMap::new();
        for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let shape = serde_json::from_value(entry["shape"].clone()).unwrap();
            let range: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
            let dtype = entry["dtype"].as_str().unwrap().to_owned();
            tensors.insert(name, (dtype, shape, data[range[0]..range[1]].to_vec()));
        }
        Self { tensors, metadata: BTreeMap::new() }
    }

    pub(crate) fn write(&self, path: &Path) {
        let mut header = serde_json::Map::new();
        if !self.metadata.is_empty() {
            header.insert("__metadata__".to_owned(), serde_json::to_value(&self.metadata).unwrap());
        }
        let mut end = 0;
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let start = end;
            end += bytes.len();
            let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(name.clone(), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = fs::File::create(path).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(&header).unwrap();
        for (_, _, bytes) in self.tensors.values() {
            file.write_all(bytes).unwrap();
        }
    }

    /// The f16 values as f32.
    pub(crate) fn widened(mut self) -> Self {
        for (dtype, _, bytes) in self.tensors.values_mut().filter(|(dtype, ..)| dtype == "F16") {
            *dtype = "F32".to_owned();
            let wide = bytes.chunks_exact(2).map(|pair| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32());
            *bytes = wide.flat_map(f32::to_le_bytes).collect();
        }
        self
    }

    fn take(&mut self, other: Self, name: impl Fn(&str) -> String) {
        self.tensors.extend(other.tensors.into_iter().map(|(old, stored)| (name(&old), stored)));
    }
}

pub(crate) const WEIGHTS: [(&str, &str); 4] = [
    ("text_encoder", "text_encoder/model.safetensors"),
    ("text_encoder_2", "text_encoder_2/model.safetensors"),
    ("unet", "unet/diffusion_pytorch_model.safetensors"),
    ("vae", "vae/diffusion_pytorch_model.safetensors"),
];

/// The model in `folder` as one file, which carries the folder's configurations: `layers` are its UNet's.
pub(crate) fn single(folder: &Path, layers: usize) -> File {
    let mut all = File::default();
    let part = |name: &str| File::read(&folder.join(WEIGHTS.iter().find(|(part, _)| *part == name).unwrap().1));
    let unet = part("unet");
    let crossed: Vec<String> = unet.tensors.keys().filter(|name| name.contains(".attentions.")).cloned().collect();
    all.take(unet, |name| format!("model.diffusion_model.{}", unet_name(name, layers, &crossed)));
    let vae = part("vae");
    let up = |name: &String| name.strip_prefix("decoder.up_blocks.")?.split('.').next()?.parse::<usize>().ok();
    let last = vae.tensors.keys().filter_map(up).max().unwrap();
    all.take(vae, |name| format!("first_stage_model.{}", vae_name(name, last)));
    all.take(part("text_encoder"), |name| format!("conditioner.embedders.0.transformer.{name}"));
    all.take(open_clip(part("text_encoder_2")), |name| format!("conditioner.embedders.1.model.{name}"));
    for name in ["text_encoder", "text_encoder_2", "unet", "vae"] {
        let config = fs::read_to_string(folder.join(name).join("config.json")).unwrap();
        all.metadata.insert(format!("config.{name}"), config);
    }
    let scheduler = fs::read_to_string(folder.join("scheduler/scheduler_config.json")).unwrap();
    all.metadata.insert("config.scheduler".to_owned(), scheduler);
    all
}

fn number(name: &str) -> (usize, &str) {
    let (number, rest) = name.split_once('.').unwrap();
    (number.parse().unwrap(), rest)
}

fn replaced(name: &str, pairs: &[(&str, &str)]) -> String {
    let found = pairs.iter().find_map(|(new, old)| Some(format!("{old}{}", name.strip_prefix(new)?)));
    found.unwrap_or_else(|| name.to_owned())
}

fn resnet_name(name: &str) -> String {
    let pairs = [
        ("norm1.", "in_layers.0."),
        ("conv1.", "in_layers.2."),
        ("time_emb_proj.", "emb_layers.1."),
        ("norm2.", "out_layers.0."),
        ("conv2.", "out_layers.3."),
        ("conv_shortcut.", "skip_connection."),
    ];
    replaced(name, &pairs)
}

/// The single-file name of a UNet's tensor. `crossed` are the tensors of transformers.
pub(crate) fn unet_name(name: &str, layers: usize, crossed: &[String]) -> String {
    if let Some(rest) = name.strip_prefix("mid_block.") {
        return match rest.split_once('.').unwrap() {
            ("attentions", rest) => format!("middle_block.1.{}", number(rest).1),
            (_, rest) => format!("middle_block.{}.{}", 2 * number(rest).0, resnet_name(number(rest).1)),
        };
    }
    if let Some((block, rest)) = name.strip_prefix("down_blocks.").map(number) {
        let (kind, rest) = rest.split_once('.').unwrap();
        let (layer, rest) = number(rest);
        let place = 1 + block * (layers + 1) + layer;
        return match kind {
            "resnets" => format!("input_blocks.{place}.0.{}", resnet_name(rest)),
            "attentions" => format!("input_blocks.{place}.1.{rest}"),
            _ => format!("input_blocks.{}.0.op.{}", (block + 1) * (layers + 1), rest.strip_prefix("conv.").unwrap()),
        };
    }
    if let Some((block, rest)) = name.strip_prefix("up_blocks.").map(number) {
        let (kind, rest) = rest.split_once('.').unwrap();
        let (layer, rest) = number(rest);
        let place = block * (layers + 1) + layer;
        return match kind {
            "resnets" => format!("output_blocks.{place}.0.{}", resnet_name(rest)),
            "attentions" => format!("output_blocks.{place}.1.{rest}"),
            _ => {
                let before = crossed.iter().any(|name| name.starts_with(&format!("up_blocks.{block}.")));
                let part = if before { 2 } else { 1 };
                format!("output_blocks.{}.{part}.{rest}", block * (layers + 1) + layers)
            }
        };
    }
    let pairs = [
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
    ];
    replaced(name, &pairs)
}

fn vae_name(name: &str, last: usize) -> String {
    let Some((half, rest)) = name.split_once('.').filter(|(half, _)| ["encoder", "decoder"].contains(half)) else {
        return name.to_owned();
    };
    let resnet = |rest: &str| replaced(rest, &[("conv_shortcut.", "nin_shortcut.")]);
    if let Some((i, rest)) = rest.strip_prefix("mid_block.resnets.").map(number) {
        return format!("{half}.mid.block_{}.{}", i + 1, resnet(rest));
    }
    if let Some((block, rest)) = rest.strip_prefix("down_blocks.").map(number) {
        return match rest.strip_prefix("resnets.").map(number) {
            Some((layer, rest)) => format!("{half}.down.{block}.block.{layer}.{}", resnet(rest)),
            None => format!("{half}.down.{block}.{}", rest.replace("downsamplers.0", "downsample")),
        };
    }
    if let Some((block, rest)) = rest.strip_prefix("up_blocks.").map(number) {
        let level = last - block;
        return match rest.strip_prefix("resnets.").map(number) {
            Some((layer, rest)) => format!("{half}.up.{level}.block.{layer}.{}", resnet(rest)),
            None => format!("{half}.up.{level}.{}", rest.replace("upsamplers.0", "upsample")),
        };
    }
    let pairs = [
        ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
        ("mid_block.attentions.0.to_q.", "mid.attn_1.q."),
        ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
        ("mid_block.attentions.0.to_v.", "mid.attn_1.v."),
        ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
        ("conv_norm_out.", "norm_out."),
    ];
    format!("{half}.{}", replaced(rest, &pairs))
}

/// The second text encoder as OpenCLIP stores it: queries, keys and values in one matrix, and the projection transposed.
fn open_clip(own: File) -> File {
    let mut made = File::default();
    let pairs = [
        ("embeddings.token_embedding.", "token_embedding."),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("final_layer_norm.", "ln_final."),
    ];
    let inner = [
        ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."),
        ("self_attn.out_proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
    ];
    for (name, stored) in &own.tensors {
        let name = name.strip_prefix("text_model.").unwrap_or(name);
        if name == "text_projection.weight" {
            made.tensors.insert("text_projection".to_owned(), transposed(stored));
        } else if let Some((layer, rest)) = name.strip_prefix("encoder.layers.").map(number) {
            let place = |rest: &str| format!("transformer.resblocks.{layer}.{rest}");
            let Some(kind) = rest.strip_prefix("self_attn.q_proj.") else {
                if !rest.starts_with("self_attn.k_proj.") && !rest.starts_with("self_attn.v_proj.") {
                    made.tensors.insert(place(&replaced(rest, &inner)), stored.clone());
                }
                continue;
            };
            let prefix = if own.tensors.contains_key(name) { "" } else { "text_model." };
            let part = |p: &str| &own.tensors[&format!("{prefix}encoder.layers.{layer}.self_attn.{p}_proj.{kind}")];
            let (dtype, mut shape, _) = stored.clone();
            shape[0] *= 3;
            let bytes = ["q", "k", "v"].map(|p| part(p).2.clone()).concat();
            made.tensors.insert(place(&format!("attn.in_proj_{kind}")), (dtype, shape, bytes));
        } else {
            made.tensors.insert(replaced(name, &pairs), stored.clone());
        }
    }
    made
}

fn transposed((dtype, shape, bytes): &Stored) -> Stored {
    let (rows, columns, width) = (shape[0], shape[1], bytes.len() / (shape[0] * shape[1]));
    let mut transposed = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let start = (row * columns + column) * width;
            transposed.extend(&bytes[start..start + width]);
        }
    }
    (dtype.clone(), vec![columns, rows], transposed)
}
