//! CLIP image encoders as transformers stores `CLIPVisionModelWithProjection` (Radford et al. 2021): ViT-L, OpenCLIP
//! ViT-H and ViT-bigG.
//!
//! Legend: `B` batch, `S` side of the image, `N` patches, `C` hidden size, `P` projected size.

use candle_core::{Result as CandleResult, Tensor};
use serde::Deserialize;

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Conv2d, ConvShape, LayerNorm, Linear, Loader, Padding};
use crate::model::networks::check::Check;
use crate::model::networks::clip::{ClipConfig, EncoderLayer};
use crate::model::networks::config::{MAX_LAYERS, Validator};
use crate::model::networks::load_error::load_error;

const STAGE: &str = "image encoder";
/// Along a side. Published ones have 16 or 24, and attention's costs grow by the fourth power.
const MOST_PATCHES: usize = 64;

/// `config.json` of an image encoder; missing keys have transformers' defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub projection_dim: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    /// `S`
    pub image_size: usize,
    pub patch_size: usize,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipVisionConfig {
    /// # Errors
    /// `model_unsupported` for a value that this network cannot compute.
    pub fn check(&self, name: &str) -> Result<()> {
        let validator = Validator { name };
        self.layers().check(name)?;
        validator.channels("projection_dim", self.projection_dim)?;
        validator.within("num_hidden_layers", self.num_hidden_layers, 2..=2 * MAX_LAYERS)?;
        validator.within("num_channels", self.num_channels, 3..=3)?;
        validator.within("image_size", self.image_size, 1..=2048)?;
        validator.within("patch_size", self.patch_size, 1..=self.image_size)?;
        validator.within("image_size / patch_size", self.side(), 1..=MOST_PATCHES)?;
        validator.within("intermediate_size", self.intermediate_size, 1..=8 * self.hidden_size)
    }

    /// Its layers' configuration in the terms of a text encoder.
    fn layers(&self) -> ClipConfig {
        ClipConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act.clone(),
            layer_norm_eps: self.layer_norm_eps,
            ..ClipConfig::default()
        }
    }

    /// `√N`
    fn side(&self) -> usize {
        self.image_size / self.patch_size.max(1)
    }
}

/// States of an image encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The projected class state: `image_embeds`, `[B, P]`.
    Whole,
    /// The class's and every patch's state before the last layer: `hidden_states[-2]`, `[B, 1 + N, C]`.
    Patches,
}

/// Encodes images.
#[derive(Clone, Debug)]
pub struct ClipVision {
    class: Tensor,
    patches: Conv2d,
    positions: Tensor,
    pre_layrnorm: LayerNorm,
    layers: Vec<EncoderLayer>,
    post_layernorm: LayerNorm,
    visual_projection: Linear,
    image_size: usize,
    sizes: [usize; 2],
}

impl ClipVision {
    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &ClipVisionConfig) -> Result<Self> {
        config.check(STAGE)?;
        let (size, patch, side) = (config.hidden_size, config.patch_size, config.side());
        let (eps, inner) = (config.layer_norm_eps, config.layers());
        let activation = inner.activation(Validator { name: STAGE })?;
        let model = loader.pp("vision_model");
        let read = || -> CandleResult<Self> {
            let (embeddings, layers) = (model.pp("embeddings"), model.pp("encoder").pp("layers"));
            let weight = embeddings.pp("patch_embedding").tensor("weight", (size, 3, patch, patch))?;
            let shape =
                ConvShape { inputs: 3, outputs: size, kernel: patch, stride: patch, padding: Padding::default() };
            Ok(Self {
                class: embeddings.tensor("class_embedding", size)?,
                patches: Conv2d::new(&weight, None, shape)?,
                positions: embeddings.pp("position_embedding").tensor("weight", (side * side + 1, size))?,
                // So spelt in every file.
                pre_layrnorm: LayerNorm::load(&model.pp("pre_layrnorm"), size, eps)?,
                layers: (0..config.num_hidden_layers)
                    .map(|i| EncoderLayer::load(&layers.pp(i), &inner, activation))
                    .collect::<CandleResult<_>>()?,
                post_layernorm: LayerNorm::load(&model.pp("post_layernorm"), size, eps)?,
                visual_projection: Linear::load_no_bias(&loader.pp("visual_projection"), size, config.projection_dim)?,
                image_size: config.image_size,
                sizes: [config.projection_dim, size],
            })
        };
        read().map_err(load_error(STAGE))
    }

    /// `S`: images are `S` by `S` pixels.
    #[must_use]
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// Channels of the result: `P` or `C`.
    #[must_use]
    pub fn channels(&self, seen: Seen) -> usize {
        match seen {
            Seen::Whole => self.sizes[0],
            Seen::Patches => self.sizes[1],
        }
    }

    /// `pixels` are `[B, S, S, 3]`, normalised; returns the states that [`Seen`] names, in their dtype.
    ///
    /// # Errors
    /// The error of `check`, called before each layer; an image of another size; device errors.
    pub fn forward(&self, pixels: &Tensor, seen: Seen, check: Check) -> Result<Tensor> {
        let (side, dtype) = (self.image_size, pixels.dtype());
        let &[batch, height, width, _] = pixels.dims() else {
            return Err(Error::bug(format!("a picture of shape {:?}", pixels.dims())));
        };
        if (height, width) != (side, side) {
            return Err(Error::bug(format!("a picture of {width} × {height} for an encoder of {side} × {side}")));
        }
        check()?;
        let begin = || -> CandleResult<Tensor> {
            let patches = self.patches.forward(pixels)?.flatten(1, 2)?; // [B, N, C]
            let class = self.class.to_dtype(dtype)?.reshape((1, 1, ()))?;
            let class = class.broadcast_as((batch, 1, class.dim(2)?))?;
            let tokens = Tensor::cat(&[&class, &patches], 1)?; // [B, 1 + N, C]
            self.pre_layrnorm.forward(&tokens.broadcast_add(&self.positions.to_dtype(dtype)?)?)
        };
        let mut x = begin().stage(STAGE)?;
        let unused = usize::from(seen == Seen::Patches);
        for layer in self.layers.iter().take(self.layers.len().saturating_sub(unused)) {
            check()?;
            x = layer.forward_unmasked(&x).stage(STAGE)?;
        }
        match seen {
            Seen::Patches => Ok(x),
            Seen::Whole => {
                let class = x.narrow(1, 0, 1).and_then(|class| class.squeeze(1)?.contiguous()).stage(STAGE)?;
                let normal = self.post_layernorm.forward(&class).stage(STAGE)?;
                self.visual_projection.forward(&normal).stage(STAGE)
            }
        }
    }
}
