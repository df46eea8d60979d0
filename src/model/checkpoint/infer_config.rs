//! Infers network configurations from tensor names and shapes, for files without any. Values that shapes do not determine
//! are SDXL's.

use std::collections::BTreeMap;

use crate::model::networks::PerBlock;
use crate::model::networks::clip::ClipConfig;
use crate::model::networks::unet::UnetConfig;
use crate::model::networks::vae::VaeConfig;
use crate::model::weights::ldm_names::number;
use crate::model::weights::open::Weights;

/// Channels of an attention head, in SDXL's UNet and in CLIP.
const HEAD: usize = 64;
/// Rows and columns of latents that SDXL was trained at.
const LATENTS: usize = 128;
/// SDXL's `scaling_factor` of latents.
pub(crate) const SCALING: f64 = 0.13025;
/// Most blocks or layers that are counted.
const MOST: usize = 64;
/// diffusers' mid block with transformers.
const CROSS_ATTENTION_MID: &str = "UNetMidBlock2DCrossAttn";

/// TensorShapes by name.
struct TensorShapes<'a>(BTreeMap<&'a str, &'a [usize]>);

impl<'a> TensorShapes<'a> {
    fn new(weights: &'a Weights) -> Self {
        Self(weights.tensors().map(|(name, stored)| (name, stored.shape.as_slice())).collect())
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The count of indices that follow `prefix` in tensor names.
    fn count(&self, prefix: &str) -> usize {
        let rests = self.0.range(prefix..).map_while(|(name, _)| name.strip_prefix(prefix));
        rests.filter_map(number).map(|(i, _)| i.saturating_add(1)).max().unwrap_or(0).min(MOST + 1)
    }

    /// The size of one axis of a tensor.
    fn side(&self, name: &str, axis: usize) -> Result<usize, String> {
        let shape = self.0.get(name).ok_or_else(|| format!("tensor `{name}` is missing"))?;
        shape.get(axis).copied().ok_or_else(|| format!("tensor `{name}` has the shape {shape:?}"))
    }
}

/// The number of attention heads for a number of channels.
fn heads(channels: usize) -> Result<usize, String> {
    match channels / HEAD {
        heads if heads > 0 && channels.is_multiple_of(HEAD) => Ok(heads),
        _ => Err(format!("{channels} channels are not a multiple of {HEAD}, the channels of an attention head")),
    }
}

/// The configuration of a UNet with diffusers' names.
pub(crate) fn unet(weights: &Weights) -> Result<UnetConfig, String> {
    let shapes = TensorShapes::new(weights);
    let blocks = shapes.count("down_blocks.");
    let channels = |i: usize| shapes.side(&format!("down_blocks.{i}.resnets.0.conv1.weight"), 0);
    let channels: Vec<usize> = (0..blocks).map(channels).collect::<Result<_, _>>()?;
    let level = |side: &str, i: usize| BlockLayers::read(&shapes, &format!("{side}_blocks.{i}"));
    let down: Vec<BlockLayers> = (0..blocks).map(|i| level("down", i)).collect::<Result<_, _>>()?;
    let up: Vec<BlockLayers> = (0..blocks).map(|i| level("up", i)).collect::<Result<_, _>>()?;
    check_symmetry(&down, &up)?;
    let mut depths: Vec<PerBlock<usize>> = down.iter().map(BlockLayers::depth_per_layer).collect();
    let mid_block_type = mid_block(&shapes, &down, &mut depths)?;
    let widths = channels.iter().zip(&down).map(|(&channels, level)| match level.depths.is_some() {
        true => heads(channels),
        false => Ok(1),
    });
    let mut widths: Vec<usize> = widths.collect::<Result<_, _>>()?;
    if let (Some(CROSS_ATTENTION_MID), Some(&last), Some(width)) = (mid_block_type, channels.last(), widths.last_mut())
    {
        *width = heads(last)?;
    }
    let text_key = shapes.0.keys().find(|name| name.ends_with("attn2.to_k.weight"));
    let text_key = text_key.ok_or("it has no layer that reads a text")?;
    let kind =
        |level: &BlockLayers, cross: &str, plain: &str| if level.depths.is_some() { cross } else { plain }.to_owned();
    Ok(UnetConfig {
        sample_size: Some(PerBlock::Same(LATENTS)),
        in_channels: shapes.side("conv_in.weight", 1)?,
        out_channels: shapes.side("conv_out.weight", 0)?,
        conv_in_kernel: shapes.side("conv_in.weight", 2)?,
        conv_out_kernel: shapes.side("conv_out.weight", 2)?,
        down_block_types: down.iter().map(|level| kind(level, "CrossAttnDownBlock2D", "DownBlock2D")).collect(),
        mid_block_type: mid_block_type.map(str::to_owned),
        up_block_types: up.iter().map(|level| kind(level, "CrossAttnUpBlock2D", "UpBlock2D")).collect(),
        block_out_channels: channels,
        layers_per_block: PerBlock::Each(down.iter().map(|level| level.layers).collect()),
        transformer_layers_per_block: PerBlock::Each(depths),
        reverse_transformer_layers_per_block: Some(up.iter().map(BlockLayers::depth_per_layer).collect()),
        cross_attention_dim: PerBlock::Same(shapes.side(text_key, 1)?),
        attention_head_dim: PerBlock::Each(widths),
        addition_embed_type: Some("text_time".to_owned()),
        addition_time_embed_dim: Some(256),
        projection_class_embeddings_input_dim: Some(shapes.side("add_embedding.linear_1.weight", 1)?),
        time_embedding_dim: Some(shapes.side("time_embedding.linear_1.weight", 0)?),
        ..UnetConfig::default()
    })
}

/// An up block has one layer more than the down block of the same resolution.
fn check_symmetry(down: &[BlockLayers], up: &[BlockLayers]) -> Result<(), String> {
    for (i, (down, up)) in down.iter().zip(up.iter().rev()).enumerate() {
        if down.layers + 1 != up.layers {
            return Err(format!("down block {i} has {} layers and its up block {}", down.layers, up.layers));
        }
    }
    Ok(())
}

/// The type of the mid block. diffusers gives it the depth of the last down block, which `depths` gets if that block has no
/// transformers itself.
fn mid_block(
    shapes: &TensorShapes,
    down: &[BlockLayers],
    depths: &mut [PerBlock<usize>],
) -> Result<Option<&'static str>, String> {
    if !shapes.has("mid_block.attentions.0.norm.weight") {
        return Ok((shapes.count("mid_block.resnets.") > 0).then_some("UNetMidBlock2D"));
    }
    let depth = shapes.count("mid_block.attentions.0.transformer_blocks.");
    match (down.last().and_then(|level| level.depths.as_ref()), depths.last_mut()) {
        (None, Some(last)) => *last = PerBlock::Same(depth),
        (Some(last), _) if last.first() == Some(&depth) => {}
        (last, _) => {
            return Err(format!("its mid block has {depth} transformers, and the last down block {last:?}"));
        }
    }
    Ok(Some(CROSS_ATTENTION_MID))
}

/// One down or up block of a UNet.
struct BlockLayers {
    layers: usize,
    /// Transformer blocks of each layer; `None` without transformers.
    depths: Option<Vec<usize>>,
}

impl BlockLayers {
    fn read(shapes: &TensorShapes, block: &str) -> Result<Self, String> {
        let layers = shapes.count(&format!("{block}.resnets."));
        let has = |i: usize| shapes.has(&format!("{block}.attentions.{i}.norm.weight"));
        let depth = |i: usize| shapes.count(&format!("{block}.attentions.{i}.transformer_blocks."));
        let depths = match (0..layers).filter(|&i| has(i)).count() {
            0 => None,
            all if all == layers => Some((0..layers).map(depth).collect()),
            some => return Err(format!("`{block}` has transformers in {some} of its {layers} layers")),
        };
        Ok(Self { layers, depths })
    }

    fn depth_per_layer(&self) -> PerBlock<usize> {
        PerBlock::Each(self.depths.clone().unwrap_or(vec![0; self.layers]))
    }
}

/// The configuration of a text encoder with transformers' names.
pub(crate) fn clip(weights: &Weights) -> Result<ClipConfig, String> {
    let shapes = TensorShapes::new(weights);
    let bare = shapes.has("embeddings.token_embedding.weight");
    let name = |rest: &str| if bare { rest.to_owned() } else { format!("text_model.{rest}") };
    let words = name("embeddings.token_embedding.weight");
    let size = shapes.side(&words, 1)?;
    let projection = [("text_projection.weight", 0), ("text_projection", 1)];
    let projected = projection.into_iter().find(|(name, _)| shapes.has(name));
    let projection_dim = projected.map(|(name, axis)| shapes.side(name, axis)).transpose()?;
    Ok(ClipConfig {
        vocab_size: shapes.side(&words, 0)?,
        hidden_size: size,
        intermediate_size: shapes.side(&name("encoder.layers.0.mlp.fc1.weight"), 0)?,
        projection_dim,
        num_hidden_layers: shapes.count(&name("encoder.layers.")),
        num_attention_heads: heads(size)?,
        max_position_embeddings: shapes.side(&name("embeddings.position_embedding.weight"), 0)?,
        // ViT-L has OpenAI's approximation of GELU; OpenCLIP's models have GELU itself.
        hidden_act: if size <= 768 { "quick_gelu" } else { "gelu" }.to_owned(),
        ..ClipConfig::default()
    })
}

/// The configuration of an autoencoder with diffusers' names.
pub(crate) fn vae(weights: &Weights) -> Result<VaeConfig, String> {
    let shapes = TensorShapes::new(weights);
    let blocks = shapes.count("encoder.down_blocks.");
    let channels = |i: usize| shapes.side(&format!("encoder.down_blocks.{i}.resnets.0.conv1.weight"), 0);
    Ok(VaeConfig {
        in_channels: shapes.side("encoder.conv_in.weight", 1)?,
        out_channels: shapes.side("decoder.conv_out.weight", 0)?,
        down_block_types: vec!["DownEncoderBlock2D".to_owned(); blocks],
        up_block_types: vec!["UpDecoderBlock2D".to_owned(); blocks],
        block_out_channels: (0..blocks).map(channels).collect::<Result<_, _>>()?,
        layers_per_block: shapes.count("encoder.down_blocks.0.resnets."),
        latent_channels: shapes.side("decoder.conv_in.weight", 1)?,
        sample_size: PerBlock::Same(1024),
        scaling_factor: SCALING,
        use_quant_conv: shapes.has("quant_conv.weight"),
        use_post_quant_conv: shapes.has("post_quant_conv.weight"),
        mid_block_add_attention: shapes.has("encoder.mid_block.attentions.0.group_norm.weight"),
        ..VaeConfig::default()
    })
}
