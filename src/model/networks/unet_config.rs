//! `unet/config.json`, and the sizes of every layer that follow from it.

use serde::Deserialize;

use crate::error::Result;
use crate::model::networks::config::{MAX_BLOCKS, MAX_CHANNELS, MAX_LAYERS, PerBlock, Validator};

/// `config.json` of a `UNet2DConditionModel`; missing keys have diffusers' defaults, and keys that do not
/// affect SDXL's blocks are not read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct UnetConfig {
    /// Height and width in latent pixels that the network was trained at.
    pub sample_size: Option<PerBlock<usize>>,
    pub in_channels: usize,
    pub out_channels: usize,
    pub center_input_sample: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub down_block_types: Vec<String>,
    pub mid_block_type: Option<String>,
    pub up_block_types: Vec<String>,
    pub only_cross_attention: PerBlock<bool>,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: PerBlock<usize>,
    pub downsample_padding: usize,
    pub mid_block_scale_factor: f64,
    pub act_fn: String,
    pub norm_num_groups: Option<usize>,
    pub norm_eps: f64,
    pub cross_attention_dim: PerBlock<usize>,
    /// Per block, or per layer of each block.
    pub transformer_layers_per_block: PerBlock<PerBlock<usize>>,
    /// Depths of the up blocks, in their order. By default the up blocks mirror the down blocks.
    pub reverse_transformer_layers_per_block: Option<Vec<PerBlock<usize>>>,
    pub encoder_hid_dim: Option<usize>,
    pub encoder_hid_dim_type: Option<String>,
    /// The *number* of heads, despite its name, unless `num_attention_heads` is given.
    pub attention_head_dim: PerBlock<usize>,
    pub num_attention_heads: Option<PerBlock<usize>>,
    pub dual_cross_attention: bool,
    pub class_embed_type: Option<String>,
    pub addition_embed_type: Option<String>,
    pub addition_time_embed_dim: Option<usize>,
    pub num_class_embeds: Option<usize>,
    pub resnet_time_scale_shift: String,
    pub time_embedding_type: String,
    pub time_embedding_dim: Option<usize>,
    pub time_embedding_act_fn: Option<String>,
    pub timestep_post_act: Option<String>,
    pub time_cond_proj_dim: Option<usize>,
    pub conv_in_kernel: usize,
    pub conv_out_kernel: usize,
    pub projection_class_embeddings_input_dim: Option<usize>,
    pub attention_type: String,
    pub class_embeddings_concat: bool,
}

impl Default for UnetConfig {
    fn default() -> Self {
        let names = |names: [&str; 4]| names.map(str::to_owned).to_vec();
        let (cross, plain) = ("CrossAttnDownBlock2D", "DownBlock2D");
        let (up_cross, up_plain) = ("CrossAttnUpBlock2D", "UpBlock2D");
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: names([cross, cross, cross, plain]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".to_owned()),
            up_block_types: names([up_plain, up_cross, up_cross, up_cross]),
            only_cross_attention: PerBlock::Same(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::Same(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            act_fn: "silu".to_owned(),
            norm_num_groups: Some(32),
            norm_eps: 1e-5,
            cross_attention_dim: PerBlock::Same(1280),
            transformer_layers_per_block: PerBlock::Same(PerBlock::Same(1)),
            reverse_transformer_layers_per_block: None,
            encoder_hid_dim: None,
            encoder_hid_dim_type: None,
            attention_head_dim: PerBlock::Same(8),
            num_attention_heads: None,
            dual_cross_attention: false,
            class_embed_type: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            num_class_embeds: None,
            resnet_time_scale_shift: "default".to_owned(),
            time_embedding_type: "positional".to_owned(),
            time_embedding_dim: None,
            time_embedding_act_fn: None,
            timestep_post_act: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            projection_class_embeddings_input_dim: None,
            attention_type: "default".to_owned(),
            class_embeddings_concat: false,
        }
    }
}

impl UnetConfig {
    /// # Errors
    /// `model_unsupported` for a value that this network cannot compute.
    pub fn check(&self, name: &str) -> Result<()> {
        self.plan(name).map(drop)
    }

    /// Count of time ids that accompany a pooled text of `pooled` channels: 6 for the base, 5 for the refiner.
    /// `None` if the text is another network's.
    #[must_use]
    pub fn time_ids(&self, pooled: usize) -> Option<usize> {
        let (whole, each) = (self.projection_class_embeddings_input_dim?, self.addition_time_embed_dim?);
        let rest = whole.checked_sub(pooled)?;
        (each > 0 && rest > 0 && rest.is_multiple_of(each)).then(|| rest / each)
    }

    /// Channels of the text that cross-attention expects; 0 in a configuration that `check` refuses.
    #[must_use]
    pub fn context_channels(&self) -> usize {
        self.cross_attention_dim.values().first().copied().unwrap_or(0)
    }

    /// Count of transformer blocks of each layer of the down blocks, from the highest resolution.
    ///
    /// # Errors
    /// The error of [`Self::check`].
    pub fn depths(&self) -> Result<Vec<usize>> {
        let down = self.plan("unet")?.down;
        Ok(down.iter().flat_map(|block| &block.layers).map(|layer| layer.depth.unwrap_or(0)).collect())
    }

    /// Names of the transformer blocks, in the order of evaluation.
    ///
    /// # Errors
    /// The error of [`Self::check`].
    pub fn transformer_blocks(&self) -> Result<Vec<String>> {
        let plan = self.plan("unet")?;
        let level = |way: &str, blocks: &[BlockPlan]| -> Vec<(String, usize)> {
            let name = |block: usize, layer: usize| format!("{way}_blocks.{block}.attentions.{layer}");
            let layers = blocks.iter().enumerate().flat_map(|(block, plan)| {
                let depths = plan.layers.iter().enumerate();
                depths.map(move |(layer, plan)| (name(block, layer), plan.depth.unwrap_or(0)))
            });
            layers.collect()
        };
        let mid = plan.mid.and_then(|mid| mid.depth).map(|depth| ("mid_block.attentions.0".to_owned(), depth));
        let all = level("down", &plan.down).into_iter().chain(mid).chain(level("up", &plan.up));
        let blocks = |(name, depth): (String, usize)| (0..depth).map(move |i| format!("{name}.transformer_blocks.{i}"));
        Ok(all.flat_map(blocks).collect())
    }

    /// Refuses configurations that diffusers computes otherwise, and those that no real network has.
    pub(crate) fn plan(&self, name: &str) -> Result<UnetPlan> {
        let validator = Validator { name };
        self.refuse_variants(validator)?;
        let blocks = self.block_out_channels.len();
        validator.within("block_out_channels", blocks, 1..=MAX_BLOCKS)?;
        self.check_lengths(validator, blocks)?;
        let sizes = self.sizes(validator)?;
        let (addition, projection) = self.added_conditioning(validator)?;
        Ok(UnetPlan {
            sizes,
            addition,
            projection,
            down: (0..blocks).map(|i| self.down_plan(validator, i)).collect::<Result<_>>()?,
            mid: self.mid_plan(validator)?,
            up: (0..blocks).map(|i| self.up_plan(validator, i)).collect::<Result<_>>()?,
        })
    }

    /// Every list must have a value for each block.
    fn check_lengths(&self, validator: Validator, blocks: usize) -> Result<()> {
        for (key, length) in
            [("down_block_types", self.down_block_types.len()), ("up_block_types", self.up_block_types.len())]
        {
            if length != blocks {
                let message =
                    format!("`{key}` must be as long as `block_out_channels`, which has {blocks}; got {length}");
                return Err(validator.refuse(message));
            }
        }
        let fits = [
            ("layers_per_block", self.layers_per_block.fits(blocks)),
            ("transformer_layers_per_block", self.transformer_layers_per_block.fits(blocks)),
            ("cross_attention_dim", self.cross_attention_dim.fits(blocks)),
            ("attention_head_dim", self.attention_head_dim.fits(blocks)),
            ("num_attention_heads", self.num_attention_heads.as_ref().is_none_or(|heads| heads.fits(blocks))),
            (
                "reverse_transformer_layers_per_block",
                self.reverse_transformer_layers_per_block.as_ref().is_none_or(|depths| depths.len() == blocks),
            ),
        ];
        if let Some((key, _)) = fits.iter().find(|(_, fits)| !fits) {
            return Err(validator.refuse(format!("`{key}` must have one value, or {blocks}")));
        }
        let uneven = self.transformer_layers_per_block.values().iter().any(|depth| matches!(depth, PerBlock::Each(_)));
        if uneven && self.reverse_transformer_layers_per_block.is_none() {
            return Err(validator.refuse(
                "`transformer_layers_per_block` has a list for a block, so `reverse_transformer_layers_per_block` is needed",
            ));
        }
        Ok(())
    }

    /// Sizes that all blocks have in common.
    fn sizes(&self, validator: Validator) -> Result<UnetSizes> {
        let Some(groups) = self.norm_num_groups else {
            return Err(validator.refuse("`norm_num_groups` must be a number, got null"));
        };
        for &channels in &self.block_out_channels {
            validator.channels("block_out_channels", channels)?;
            validator.divides("norm_num_groups", groups, channels)?;
        }
        validator.epsilon("norm_eps", self.norm_eps)?;
        for (key, value) in [("in_channels", self.in_channels), ("out_channels", self.out_channels)] {
            validator.channels(key, value)?;
        }
        for (key, value) in [("conv_in_kernel", self.conv_in_kernel), ("conv_out_kernel", self.conv_out_kernel)] {
            if value % 2 == 0 || value > 9 {
                return Err(validator.refuse(format!("`{key}` must be odd and at most 9, got {value}")));
            }
        }
        let context = self.context_channels();
        validator.channels("cross_attention_dim", context)?;
        if self.cross_attention_dim.values().iter().any(|&other| other != context) {
            return Err(validator.refuse("`cross_attention_dim` must be the same for every block"));
        }
        let width = self.channels(0);
        let time = self.time_embedding_dim.unwrap_or(4 * width);
        validator.within("time_embedding_dim", time, 1..=4 * MAX_CHANNELS)?;
        self.check_frequencies(validator, "block_out_channels", width)?;
        Ok(UnetSizes { groups, eps: self.norm_eps, time, context })
    }

    /// Channels of each added number, and of the whole added conditioning.
    fn added_conditioning(&self, validator: Validator) -> Result<(usize, usize)> {
        let (Some(addition), Some(projection)) =
            (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        else {
            return Err(validator.refuse(
                "`addition_time_embed_dim` and `projection_class_embeddings_input_dim` must be numbers, got null",
            ));
        };
        validator.channels("addition_time_embed_dim", addition)?;
        self.check_frequencies(validator, "addition_time_embed_dim", addition)?;
        validator.within("projection_class_embeddings_input_dim", projection, 1..=4 * MAX_CHANNELS)?;
        Ok((addition, projection))
    }

    fn refuse_variants(&self, validator: Validator) -> Result<()> {
        validator.absent("center_input_sample", self.center_input_sample)?;
        validator.absent("only_cross_attention", self.only_cross_attention.values().contains(&true))?;
        validator.absent("dual_cross_attention", self.dual_cross_attention)?;
        validator.absent("class_embed_type", self.class_embed_type.is_some())?;
        validator.absent("num_class_embeds", self.num_class_embeds.is_some())?;
        validator.absent("class_embeddings_concat", self.class_embeddings_concat)?;
        validator.absent("encoder_hid_dim", self.encoder_hid_dim.is_some())?;
        validator.absent("encoder_hid_dim_type", self.encoder_hid_dim_type.is_some())?;
        validator.absent("time_embedding_act_fn", self.time_embedding_act_fn.is_some())?;
        validator.absent("timestep_post_act", self.timestep_post_act.is_some())?;
        validator.absent("time_cond_proj_dim", self.time_cond_proj_dim.is_some())?;
        validator.absent("mid_block_scale_factor", self.mid_block_scale_factor != 1.0)?;
        validator.absent("downsample_padding", self.downsample_padding != 1)?;
        validator.is("act_fn", &self.act_fn, &["silu", "swish"])?;
        validator.is("resnet_time_scale_shift", &self.resnet_time_scale_shift, &["default"])?;
        validator.is("time_embedding_type", &self.time_embedding_type, &["positional"])?;
        validator.is("attention_type", &self.attention_type, &["default"])?;
        validator.is("addition_embed_type", self.addition_embed_type.as_deref().unwrap_or("null"), &["text_time"])
    }

    fn check_frequencies(&self, validator: Validator, key: &str, width: usize) -> Result<()> {
        if self.freq_shift.is_finite() && (width / 2) as f64 - self.freq_shift >= 0.5 {
            return Ok(());
        }
        Err(validator.refuse(format!("`freq_shift` {} leaves no frequencies for `{key}` {width}", self.freq_shift)))
    }

    fn channels(&self, block: usize) -> usize {
        self.block_out_channels.get(block).copied().unwrap_or(0)
    }

    /// Attention heads of down block `block`.
    fn heads(&self, validator: Validator, block: usize) -> Result<usize> {
        let (key, heads) = match &self.num_attention_heads {
            Some(heads) => ("num_attention_heads", heads),
            None => ("attention_head_dim", &self.attention_head_dim),
        };
        let heads = heads.at(block).copied().unwrap_or(0);
        validator.divides(key, heads, self.channels(block))?;
        Ok(heads)
    }

    fn layers(&self, validator: Validator, block: usize) -> Result<usize> {
        let layers = self.layers_per_block.at(block).copied().unwrap_or(0);
        validator.within("layers_per_block", layers, 1..=MAX_LAYERS)?;
        Ok(layers)
    }

    fn down_plan(&self, validator: Validator, block: usize) -> Result<BlockPlan> {
        let kind = self.down_block_types.get(block).map_or("", String::as_str);
        validator.is("down_block_types", kind, &["DownBlock2D", "CrossAttnDownBlock2D"])?;
        let crosses = kind == "CrossAttnDownBlock2D";
        let outputs = self.channels(block);
        let before = self.channels(block.saturating_sub(1));
        let depths = (DEPTHS, self.transformer_layers_per_block.at(block));
        let layers = (0..self.layers(validator, block)?).map(|i| {
            let depth = if crosses { Some(depth(validator, depths, i)?) } else { None };
            Ok(LayerPlan { inputs: if i == 0 { before } else { outputs }, depth })
        });
        Ok(BlockPlan {
            layers: layers.collect::<Result<_>>()?,
            outputs,
            heads: if crosses { self.heads(validator, block)? } else { 1 },
            resamples: block + 1 < self.block_out_channels.len(),
        })
    }

    fn up_plan(&self, validator: Validator, step: usize) -> Result<BlockPlan> {
        let kind = self.up_block_types.get(step).map_or("", String::as_str);
        validator.is("up_block_types", kind, &["UpBlock2D", "CrossAttnUpBlock2D"])?;
        let crosses = kind == "CrossAttnUpBlock2D";
        let block = self.block_out_channels.len() - 1 - step; // the down block of this level
        let outputs = self.channels(block);
        let before = if step == 0 { outputs } else { self.channels(block + 1) };
        let depths = match &self.reverse_transformer_layers_per_block {
            Some(depths) => ("reverse_transformer_layers_per_block", depths.get(step)),
            None => (DEPTHS, self.transformer_layers_per_block.at(block)),
        };
        let count = self.layers(validator, block)? + 1;
        let layers = (0..count).map(|i| {
            let skip = if i + 1 == count { self.channels(block.saturating_sub(1)) } else { outputs };
            let depth = if crosses { Some(depth(validator, depths, i)?) } else { None };
            Ok(LayerPlan { inputs: skip + if i == 0 { before } else { outputs }, depth })
        });
        Ok(BlockPlan {
            layers: layers.collect::<Result<_>>()?,
            outputs,
            heads: if crosses { self.heads(validator, block)? } else { 1 },
            resamples: block > 0,
        })
    }

    fn mid_plan(&self, validator: Validator) -> Result<Option<MidPlan>> {
        let Some(kind) = self.mid_block_type.as_deref() else { return Ok(None) };
        validator.is("mid_block_type", kind, &["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])?;
        let last = self.block_out_channels.len() - 1;
        let channels = self.channels(last);
        if kind == "UNetMidBlock2D" {
            return Ok(Some(MidPlan { channels, heads: 1, depth: None }));
        }
        let depth = depth(validator, (DEPTHS, self.transformer_layers_per_block.at(last)), 0)?;
        Ok(Some(MidPlan { channels, heads: self.heads(validator, last)?, depth: Some(depth) }))
    }
}

const DEPTHS: &str = "transformer_layers_per_block";

/// The depth of a layer; `depths` are a block's, with their key.
fn depth(validator: Validator, (key, depths): (&str, Option<&PerBlock<usize>>), layer: usize) -> Result<usize> {
    let Some(&depth) = depths.and_then(|depths| depths.at(layer)) else {
        return Err(validator.refuse(format!("`{key}` has no value for layer {layer} of a block")));
    };
    validator.within(key, depth, 0..=MAX_LAYERS)?;
    Ok(depth)
}

/// Sizes of all blocks of a valid configuration.
#[derive(Clone, Debug)]
pub(crate) struct UnetPlan {
    pub(crate) sizes: UnetSizes,
    pub(crate) addition: usize,
    pub(crate) projection: usize,
    pub(crate) down: Vec<BlockPlan>,
    pub(crate) mid: Option<MidPlan>,
    pub(crate) up: Vec<BlockPlan>,
}

impl UnetPlan {
    /// Channels of each skip connection, in the order of evaluation.
    pub(crate) fn skips(&self) -> Vec<usize> {
        let first = self.down.first().map(|block| block.outputs);
        let of_block =
            |block: &BlockPlan| std::iter::repeat_n(block.outputs, block.layers.len() + usize::from(block.resamples));
        first.into_iter().chain(self.down.iter().flat_map(of_block)).collect()
    }

    /// Halvings of the resolution of each of [`Self::skips`].
    pub(crate) fn skip_levels(&self) -> Vec<usize> {
        let of_block = |(level, block): (usize, &BlockPlan)| {
            let halved = block.resamples.then_some(level + 1);
            std::iter::repeat_n(level, block.layers.len()).chain(halved)
        };
        std::iter::once(0).chain(self.down.iter().enumerate().flat_map(of_block)).collect()
    }
}

/// Sizes that all blocks have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnetSizes {
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// Width of the time embedding.
    pub(crate) time: usize,
    /// Channels of the text.
    pub(crate) context: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct BlockPlan {
    pub(crate) layers: Vec<LayerPlan>,
    pub(crate) outputs: usize,
    pub(crate) heads: usize,
    /// True if a change of resolution follows.
    pub(crate) resamples: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerPlan {
    /// In up blocks including the skip connection's channels.
    pub(crate) inputs: usize,
    /// Transformer blocks; `None` where the layer has no transformer at all.
    pub(crate) depth: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct MidPlan {
    pub(crate) channels: usize,
    pub(crate) heads: usize,
    /// `None`: one residual block and nothing else.
    pub(crate) depth: Option<usize>,
}
