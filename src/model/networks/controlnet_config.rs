//! Configuration of a ControlNet: its `config.json`, or, for a single file, sizes inferred from its tensors.

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::model::networks::config::{MAX_BLOCKS, MAX_LAYERS, PerBlock, Validator};
use crate::model::networks::unet_config::{UnetConfig, UnetPlan};

/// A tensor that every ControlNet has, and no other network.
const MARK: &str = "controlnet_cond_embedding.conv_in.weight";
/// Channels of the hint's embedding at full size, at most; twice as many at half of it, and so on. Published ones have 16,
/// and 256 at an eighth.
const MOST_HINT: usize = 128;
/// Heads of a union's transformer where no configuration names them, as in every published one.
const UNION_HEADS: usize = 8;

/// `config.json` of a `ControlNetModel` or `ControlNetUnionModel`; missing keys have diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ControlNetFile {
    #[serde(flatten)]
    trunk: UnetConfig,
    controlnet_conditioning_channel_order: String,
    global_pool_conditions: bool,
    num_trans_head: usize,
}

impl Default for ControlNetFile {
    fn default() -> Self {
        Self {
            trunk: UnetConfig::default(),
            controlnet_conditioning_channel_order: "rgb".to_owned(),
            global_pool_conditions: false,
            num_trans_head: UNION_HEADS,
        }
    }
}

/// Configuration of a ControlNet, complete.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlNetConfig {
    /// The down blocks and the middle block, as a UNet's; its up blocks mean nothing.
    pub(crate) trunk: UnetConfig,
    /// Channels of the hint's embedding at each resolution, and of the hint itself.
    pub(crate) hint: Vec<usize>,
    pub(crate) hint_inputs: usize,
    /// True if the hint's channels are blue, green, red.
    pub(crate) bgr: bool,
    pub(crate) union: Option<UnionShape>,
}

/// Sizes of a union's transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnionShape {
    /// Count of kinds of hints.
    pub(crate) kinds: usize,
    pub(crate) channels: usize,
    pub(crate) heads: usize,
    pub(crate) layers: usize,
}

/// Shapes of the tensors of a file, by diffusers' names.
pub type Shapes<'a> = &'a dyn Fn(&str) -> Option<&'a [usize]>;

/// The files of a ControlNet, and the model that it is used with.
#[derive(Clone)]
pub struct ControlNetConfigTask<'a, 's> {
    /// The network as its user knows it.
    pub name: &'a str,
    /// Its `config.json`, if there is one.
    pub file: Option<ControlNetFile>,
    pub shapes: Shapes<'s>,
    /// The model's UNet.
    pub unet: &'a UnetConfig,
    /// Pixels per latent pixel of the model, along each side.
    pub reduction: usize,
}

impl ControlNetConfig {
    /// # Errors
    /// `model_unsupported` for another kind of network, a ControlNet of another UNet, or one that cannot be computed.
    pub fn new(task: ControlNetConfigTask) -> Result<Self> {
        let ControlNetConfigTask { name, file, shapes, unet, reduction } = task;
        let validator = Validator { name };
        let Some(&[first, hint_inputs, ..]) = shapes(MARK) else {
            return Err(validator.refuse(format!("it is no ControlNet: it has no tensor `{MARK}`")));
        };
        let file = match file {
            Some(file) => file,
            None => ControlNetFile {
                trunk: TrunkInference { validator, shapes, unet }.trunk()?,
                ..ControlNetFile::default()
            },
        };
        validator.absent("global_pool_conditions", file.global_pool_conditions)?;
        let order = file.controlnet_conditioning_channel_order.as_str();
        validator.is("controlnet_conditioning_channel_order", order, &["rgb", "bgr"])?;
        let later = |i: usize| shapes(&format!("controlnet_cond_embedding.blocks.{}.weight", 2 * i + 1));
        let later = (0..MAX_BLOCKS).map_while(|i| later(i)?.first().copied());
        let blocks = file.trunk.block_out_channels.len();
        let trunk = UnetConfig {
            up_block_types: vec!["UpBlock2D".to_owned(); blocks],
            reverse_transformer_layers_per_block: None,
            ..file.trunk
        };
        let config = Self {
            trunk,
            hint: std::iter::once(first).chain(later).collect(),
            hint_inputs,
            bgr: order == "bgr",
            union: union(validator, shapes, file.num_trans_head)?,
        };
        config.check_hint(validator, reduction)?;
        config.suits(validator, unet)?;
        Ok(config)
    }

    /// Count of kinds of hints that a union distinguishes; `None` for an ordinary ControlNet.
    #[must_use]
    pub fn kinds(&self) -> Option<usize> {
        self.union.map(|union| union.kinds)
    }

    pub(crate) fn plan(&self, name: &str) -> Result<UnetPlan> {
        self.trunk.plan(name)
    }

    /// The hint's embedding must have the size of latents, and must not have too many channels.
    fn check_hint(&self, validator: Validator, reduction: usize) -> Result<()> {
        for (halvings, &channels) in self.hint.iter().enumerate() {
            validator.within("conditioning_embedding_out_channels", channels, 1..=MOST_HINT << halvings)?;
        }
        if self.hint_inputs != 3 {
            return Err(validator.refuse(format!("its hint has {} channels, and images have 3", self.hint_inputs)));
        }
        let own = 1 << self.hint.len().saturating_sub(1);
        if own != reduction {
            let message =
                format!("it makes images {own} times smaller, and the model's latents are {reduction} times smaller");
            return Err(validator.refuse(message));
        }
        Ok(())
    }

    /// Residuals must fit the feature maps of `unet`.
    fn suits(&self, validator: Validator, unet: &UnetConfig) -> Result<()> {
        let (own, other) = (self.plan(validator.name)?, unet.plan("unet")?);
        let list = |channels: Vec<usize>| channels.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        if own.skips() != other.skips() {
            let (own, other) = (list(own.skips()), list(other.skips()));
            let message = format!("it controls feature maps of {own} channels, and the model's UNet has {other}");
            return Err(validator.refuse(message));
        }
        if own.skip_levels() != other.skip_levels() {
            return Err(validator.refuse("it controls feature maps of other resolutions than the model's UNet has"));
        }
        let numbers = [
            ("channels for each added number", own.addition, other.addition),
            ("channels of text", own.sizes.context, other.sizes.context),
            ("channels of added conditioning", own.projection, other.projection),
        ];
        for (what, own, other) in numbers {
            if own != other {
                return Err(validator.refuse(format!("it takes {own} {what}, and the model's UNet takes {other}")));
            }
        }
        let width = own.down.first().map_or(0, |block| block.outputs);
        if let Some(UnionShape { channels, .. }) = self.union
            && channels != width
        {
            let message = format!("its `task_embedding` has {channels} channels, and its first feature map {width}");
            return Err(validator.refuse(message));
        }
        if self.trunk.in_channels > unet.in_channels {
            let (own, other) = (self.trunk.in_channels, unet.in_channels);
            return Err(validator.refuse(format!("it takes {own} latent channels, and the model's UNet takes {other}")));
        }
        Ok(())
    }
}

/// A single file without configuration, whose trunk is inferred from its tensors.
struct TrunkInference<'a, 's> {
    validator: Validator<'a>,
    shapes: Shapes<'s>,
    /// The model's UNet, for everything that tensors do not show.
    unet: &'a UnetConfig,
}

impl TrunkInference<'_, '_> {
    fn trunk(&self) -> Result<UnetConfig> {
        let outputs = |i: usize| self.side(&format!("down_blocks.{i}.resnets.0.conv1.weight"), 0);
        let channels: Vec<usize> = (0..MAX_BLOCKS).map_while(outputs).collect();
        let blocks = channels.len();
        if blocks == 0 {
            let message = "it is no ControlNet: it has no tensor `down_blocks.0.resnets.0.conv1.weight`";
            return Err(self.validator.refuse(message));
        }
        let names: Vec<String> = (0..blocks).map(|i| format!("down_blocks.{i}")).collect();
        let kind = |name: &String| if self.crosses(name) { "CrossAttnDownBlock2D" } else { "DownBlock2D" }.to_owned();
        let (depths, mid_block_type) = self.depths(&names)?;
        let context =
            |block: &str| self.side(&format!("{block}.attentions.0.transformer_blocks.0.attn2.to_k.weight"), 1);
        let context = names.iter().map(String::as_str).chain(["mid_block"]).find_map(context);
        let unet = self.unet;
        Ok(UnetConfig {
            in_channels: self.side("conv_in.weight", 1).unwrap_or(unet.in_channels),
            down_block_types: names.iter().map(kind).collect(),
            mid_block_type,
            layers_per_block: PerBlock::Each(names.iter().map(|name| self.layers(name)).collect()),
            transformer_layers_per_block: PerBlock::Each(depths.into_iter().map(PerBlock::Same).collect()),
            cross_attention_dim: context.map_or_else(|| unet.cross_attention_dim.clone(), PerBlock::Same),
            projection_class_embeddings_input_dim: self
                .side("add_embedding.linear_1.weight", 1)
                .or(unet.projection_class_embeddings_input_dim),
            // Tensors do not show how many heads share them. A network for another UNet is refused before it matters.
            attention_head_dim: heads(&unet.attention_head_dim, blocks),
            num_attention_heads: unet.num_attention_heads.as_ref().map(|each| heads(each, blocks)),
            block_out_channels: channels,
            ..unet.clone()
        })
    }

    /// Transformer blocks of each down block, and the type of the middle block.
    fn depths(&self, names: &[String]) -> Result<(Vec<usize>, Option<String>)> {
        let depth = |block: &str| self.depth(block, 0);
        // A configuration has one depth for each block, and the last block's for the middle.
        let is_uneven = |block: &&String| (1..self.layers(block)).any(|layer| self.depth(block, layer) != depth(block));
        if let Some(block) = names.iter().find(is_uneven) {
            let message = format!("the transformers of its `{block}` are of different depths");
            return Err(self.validator.refuse(message));
        }
        let mut depths: Vec<usize> = names.iter().map(|block| depth(block)).collect();
        let (last, middle) = (depths.last().copied().unwrap_or(0), depth("mid_block"));
        let crosses = self.crosses("mid_block");
        if last > 0 && crosses && middle != last {
            let message =
                format!("its middle has {middle} transformer blocks, and its last block {last}: both must be as many");
            return Err(self.validator.refuse(message));
        }
        let mid = match (self.has("mid_block.resnets.0.conv1.weight"), crosses) {
            (false, _) => None,
            (true, false) => Some("UNetMidBlock2D"),
            (true, true) => {
                // The middle has the last block's depth, of which a plain last block needs none.
                if let Some(last) = depths.last_mut() {
                    *last = middle;
                }
                Some("UNetMidBlock2DCrossAttn")
            }
        };
        Ok((depths, mid.map(str::to_owned)))
    }

    fn has(&self, tensor: &str) -> bool {
        (self.shapes)(tensor).is_some()
    }

    fn side(&self, tensor: &str, axis: usize) -> Option<usize> {
        (self.shapes)(tensor)?.get(axis).copied()
    }

    fn crosses(&self, block: &str) -> bool {
        self.has(&format!("{block}.attentions.0.norm.weight"))
    }

    fn layers(&self, block: &str) -> usize {
        (0..MAX_LAYERS).take_while(|layer| self.has(&format!("{block}.resnets.{layer}.conv1.weight"))).count()
    }

    fn depth(&self, block: &str, layer: usize) -> usize {
        let name = |i: usize| format!("{block}.attentions.{layer}.transformer_blocks.{i}.attn2.to_k.weight");
        (0..MAX_LAYERS).take_while(|&i| self.has(&name(i))).count()
    }
}

/// `each`, or one head if `each` is for another count of blocks.
fn heads(each: &PerBlock<usize>, blocks: usize) -> PerBlock<usize> {
    if each.fits(blocks) { each.clone() } else { PerBlock::Same(1) }
}

fn union(validator: Validator, shapes: Shapes, heads: usize) -> Result<Option<UnionShape>> {
    let Some(shape) = shapes("task_embedding") else { return Ok(None) };
    let &[kinds, channels] = shape else {
        return Err(validator.refuse(format!("tensor `task_embedding` must have two axes, got {shape:?}")));
    };
    validator.within("num_control_type", kinds, 1..=64)?;
    validator.channels("num_trans_channel", channels)?;
    validator.divides("num_trans_head", heads, channels)?;
    let layers =
        (0..MAX_LAYERS).take_while(|i| shapes(&format!("transformer_layes.{i}.ln_1.weight")).is_some()).count();
    Ok(Some(UnionShape { kinds, channels, heads, layers }))
}

/// Kinds of hints of published unions, and their indices.
pub const KINDS: &[(&str, usize)] = &[
    ("openpose", 0),
    ("depth", 1),
    ("hed", 2),
    ("pidi", 2),
    ("scribble", 2),
    ("ted", 2),
    ("canny", 3),
    ("lineart", 3),
    ("anime_lineart", 3),
    ("mlsd", 3),
    ("normal", 4),
    ("segment", 5),
    ("tile", 6),
    ("repaint", 7),
];

/// The index of a kind of hint.
///
/// # Errors
/// `unknown_name` with the nearest name.
pub fn kind(name: &str) -> Result<usize> {
    let lower = name.to_lowercase();
    KINDS.iter().find(|(known, _)| *known == lower).map(|(_, index)| *index).ok_or_else(|| Error::UnknownName {
        kind: "control type",
        name: name.to_owned(),
        nearest: crate::error::nearest(name, KINDS.iter().map(|(known, _)| *known)),
        field: None,
    })
}
