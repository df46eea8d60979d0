//! Full-size SDXL networks by names and shapes, and sparse files of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use super::single_file::unet_name;

/// The layout of a full-size UNet.
#[derive(Clone, Copy)]
pub(crate) struct Build {
    pub(crate) inputs: usize,
    pub(crate) channels: &'static [usize],
    /// Transformer depth of each level on the way down, `None` for a level without.
    pub(crate) down: &'static [Option<&'static [usize]>],
    /// 0 means a single residual block.
    pub(crate) mid: Option<usize>,
    pub(crate) up: &'static [Option<&'static [usize]>],
    pub(crate) layers: usize,
    pub(crate) context: usize,
    pub(crate) added: usize,
}

pub(crate) const BASE: Build = Build {
    inputs: 4,
    channels: &[320, 640, 1280],
    down: &[None, Some(&[2, 2]), Some(&[10, 10])],
    mid: Some(10),
    up: &[Some(&[10, 10, 10]), Some(&[2, 2, 2]), None],
    layers: 2,
    context: 2048,
    added: 2816,
};

/// Names and shapes of tensors.
pub(crate) type Layout = BTreeMap<String, Vec<usize>>;

impl Build {
    /// Its tensors under diffusers' names.
    pub(crate) fn layout(&self) -> Layout {
        let mut all = Layout::new();
        let time = 4 * self.channels[0];
        let layer = |all: &mut Layout, name: &str, outputs: usize, inputs: usize| {
            all.insert(format!("{name}.weight"), vec![outputs, inputs]);
            all.insert(format!("{name}.bias"), vec![outputs]);
        };
        let conv = |all: &mut Layout, name: &str, outputs: usize, inputs: usize, kernel: usize| {
            all.insert(format!("{name}.weight"), vec![outputs, inputs, kernel, kernel]);
            all.insert(format!("{name}.bias"), vec![outputs]);
        };
        let norm = |all: &mut Layout, name: &str, channels: usize| {
            all.insert(format!("{name}.weight"), vec![channels]);
            all.insert(format!("{name}.bias"), vec![channels]);
        };
        let resnet = |all: &mut Layout, name: &str, inputs: usize, outputs: usize| {
            norm(all, &format!("{name}.norm1"), inputs);
            conv(all, &format!("{name}.conv1"), outputs, inputs, 3);
            layer(all, &format!("{name}.time_emb_proj"), outputs, time);
            norm(all, &format!("{name}.norm2"), outputs);
            conv(all, &format!("{name}.conv2"), outputs, outputs, 3);
            if inputs != outputs {
                conv(all, &format!("{name}.conv_shortcut"), outputs, inputs, 1);
            }
        };
        let transformer = |all: &mut Layout, name: &str, channels: usize, depth: usize| {
            norm(all, &format!("{name}.norm"), channels);
            layer(all, &format!("{name}.proj_in"), channels, channels);
            layer(all, &format!("{name}.proj_out"), channels, channels);
            for i in 0..depth {
                let block = format!("{name}.transformer_blocks.{i}");
                for (attention, context) in [("attn1", channels), ("attn2", self.context)] {
                    all.insert(format!("{block}.{attention}.to_q.weight"), vec![channels, channels]);
                    all.insert(format!("{block}.{attention}.to_k.weight"), vec![channels, context]);
                    all.insert(format!("{block}.{attention}.to_v.weight"), vec![channels, context]);
                    layer(all, &format!("{block}.{attention}.to_out.0"), channels, channels);
                }
                (1..4).for_each(|n| norm(all, &format!("{block}.norm{n}"), channels));
                layer(all, &format!("{block}.ff.net.0.proj"), 8 * channels, channels);
                layer(all, &format!("{block}.ff.net.2"), channels, 4 * channels);
            }
        };
        layer(&mut all, "time_embedding.linear_1", time, self.channels[0]);
        layer(&mut all, "time_embedding.linear_2", time, time);
        layer(&mut all, "add_embedding.linear_1", time, self.added);
        layer(&mut all, "add_embedding.linear_2", time, time);
        conv(&mut all, "conv_in", self.channels[0], self.inputs, 3);
        norm(&mut all, "conv_norm_out", self.channels[0]);
        conv(&mut all, "conv_out", 4, self.channels[0], 3);
        let last = self.channels.len() - 1;
        let mut skips = vec![self.channels[0]];
        let mut width = self.channels[0];
        for (block, &channels) in self.channels.iter().enumerate() {
            for i in 0..self.layers {
                resnet(&mut all, &format!("down_blocks.{block}.resnets.{i}"), width, channels);
                if let Some(depths) = self.down[block] {
                    transformer(&mut all, &format!("down_blocks.{block}.attentions.{i}"), channels, depths[i]);
                }
                width = channels;
                skips.push(width);
            }
            if block < last {
                conv(&mut all, &format!("down_blocks.{block}.downsamplers.0.conv"), channels, channels, 3);
                skips.push(width);
            }
        }
        if let Some(depth) = self.mid {
            resnet(&mut all, "mid_block.resnets.0", width, width);
            if depth > 0 {
                transformer(&mut all, "mid_block.attentions.0", width, depth);
                resnet(&mut all, "mid_block.resnets.1", width, width);
            }
        }
        for (block, &channels) in self.channels.iter().rev().enumerate() {
            for i in 0..=self.layers {
                let inputs = width + skips.pop().unwrap();
                resnet(&mut all, &format!("up_blocks.{block}.resnets.{i}"), inputs, channels);
                if let Some(depths) = self.up[block] {
                    transformer(&mut all, &format!("up_blocks.{block}.attentions.{i}"), channels, depths[i]);
                }
                width = channels;
            }
            if block < last {
                conv(&mut all, &format!("up_blocks.{block}.upsamplers.0.conv"), channels, channels, 3);
            }
        }
        all
    }

    /// The same under the names and the prefix of single files.
    pub(crate) fn single(&self) -> Layout {
        let own = self.layout();
        let crossed: Vec<String> = own.keys().filter(|name| name.contains(".attentions.")).cloned().collect();
        let name = |name: &str| format!("model.diffusion_model.{}", unet_name(name, self.layers, &crossed));
        own.iter().map(|(own, shape)| (name(own), shape.clone())).collect()
    }
}

/// SDXL's autoencoder in a single file.
pub(crate) fn vae() -> Layout {
    let mut all = Layout::new();
    let conv = |all: &mut Layout, name: &str, outputs: usize, inputs: usize, kernel: usize| {
        all.insert(format!("first_stage_model.{name}.weight"), vec![outputs, inputs, kernel, kernel]);
        all.insert(format!("first_stage_model.{name}.bias"), vec![outputs]);
    };
    let norm = |all: &mut Layout, name: &str, channels: usize| {
        all.insert(format!("first_stage_model.{name}.weight"), vec![channels]);
        all.insert(format!("first_stage_model.{name}.bias"), vec![channels]);
    };
    let resnet = |all: &mut Layout, name: &str, inputs: usize, outputs: usize| {
        norm(all, &format!("{name}.norm1"), inputs);
        conv(all, &format!("{name}.conv1"), outputs, inputs, 3);
        norm(all, &format!("{name}.norm2"), outputs);
        conv(all, &format!("{name}.conv2"), outputs, outputs, 3);
        if inputs != outputs {
            conv(all, &format!("{name}.nin_shortcut"), outputs, inputs, 1);
        }
    };
    let levels = [128, 256, 512, 512];
    for half in ["encoder", "decoder"] {
        resnet(&mut all, &format!("{half}.mid.block_1"), 512, 512);
        resnet(&mut all, &format!("{half}.mid.block_2"), 512, 512);
        norm(&mut all, &format!("{half}.mid.attn_1.norm"), 512);
        for part in ["q", "k", "v", "proj_out"] {
            conv(&mut all, &format!("{half}.mid.attn_1.{part}"), 512, 512, 1);
        }
        norm(&mut all, &format!("{half}.norm_out"), if half == "encoder" { 512 } else { 128 });
    }
    conv(&mut all, "encoder.conv_in", 128, 3, 3);
    conv(&mut all, "encoder.conv_out", 8, 512, 3);
    conv(&mut all, "decoder.conv_in", 512, 4, 3);
    conv(&mut all, "decoder.conv_out", 3, 128, 3);
    conv(&mut all, "quant_conv", 8, 8, 1);
    conv(&mut all, "post_quant_conv", 4, 4, 1);
    let mut width = 128;
    for (level, channels) in levels.into_iter().enumerate() {
        for i in 0..2 {
            resnet(&mut all, &format!("encoder.down.{level}.block.{i}"), width, channels);
            width = channels;
        }
        if level < 3 {
            conv(&mut all, &format!("encoder.down.{level}.downsample.conv"), channels, channels, 3);
        }
    }
    for (level, channels) in levels.into_iter().enumerate().rev() {
        for i in 0..3 {
            resnet(&mut all, &format!("decoder.up.{level}.block.{i}"), width, channels);
            width = channels;
        }
        if level > 0 {
            conv(&mut all, &format!("decoder.up.{level}.upsample.conv"), channels, channels, 3);
        }
    }
    all
}

/// CLIP ViT-L behind the prefix of the base model.
pub(crate) fn clip() -> Layout {
    let mut all = Layout::new();
    let mut add = |name: String, shape: &[usize]| {
        all.insert(format!("conditioner.embedders.0.transformer.text_model.{name}"), shape.to_vec());
    };
    add("embeddings.token_embedding.weight".into(), &[49408, 768]);
    add("embeddings.position_embedding.weight".into(), &[77, 768]);
    for kind in ["weight", "bias"] {
        add(format!("final_layer_norm.{kind}"), &[768]);
    }
    for i in 0..12 {
        for (name, sides) in [
            ("layer_norm1", [768, 0]),
            ("layer_norm2", [768, 0]),
            ("self_attn.q_proj", [768, 768]),
            ("self_attn.k_proj", [768, 768]),
            ("self_attn.v_proj", [768, 768]),
            ("self_attn.out_proj", [768, 768]),
            ("mlp.fc1", [3072, 768]),
            ("mlp.fc2", [768, 3072]),
        ] {
            add(format!("encoder.layers.{i}.{name}.weight"), if sides[1] == 0 { &sides[..1] } else { &sides });
            add(format!("encoder.layers.{i}.{name}.bias"), &sides[..1]);
        }
    }
    all
}

/// OpenCLIP ViT-bigG as the `n`th encoder.
pub(crate) fn big_clip(n: usize) -> Layout {
    let mut all = Layout::new();
    let mut add = |name: String, shape: &[usize]| {
        all.insert(format!("conditioner.embedders.{n}.model.{name}"), shape.to_vec());
    };
    add("token_embedding.weight".into(), &[49408, 1280]);
    add("positional_embedding".into(), &[77, 1280]);
    add("text_projection".into(), &[1280, 1280]);
    add("logit_scale".into(), &[]);
    for kind in ["weight", "bias"] {
        add(format!("ln_final.{kind}"), &[1280]);
    }
    for i in 0..32 {
        for (name, sides) in [
            ("ln_1.", [1280, 0]),
            ("ln_2.", [1280, 0]),
            ("attn.in_proj_", [3840, 1280]),
            ("attn.out_proj.", [1280, 1280]),
            ("mlp.c_fc.", [5120, 1280]),
            ("mlp.c_proj.", [1280, 5120]),
        ] {
            let name = format!("transformer.resblocks.{i}.{name}");
            add(format!("{name}weight"), if sides[1] == 0 { &sides[..1] } else { &sides });
            add(format!("{name}bias"), &sides[..1]);
        }
    }
    all
}

/// A sparse file of these tensors in f16.
pub(crate) fn sparse(layout: &Layout, dtype: &str, metadata: &[(&str, &str)], path: &Path) {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), metadata.iter().copied().collect());
    }
    let width = match dtype {
        "F8_E4M3" => 1,
        "F32" => 4,
        _ => 2,
    };
    let mut end = 0;
    for (name, shape) in layout {
        let start = end;
        end += width * shape.iter().product::<usize>() as u64;
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}
