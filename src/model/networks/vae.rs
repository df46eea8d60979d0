//! The autoencoder between images and latents: `AutoencoderKL` (Kingma & Welling 2013; Rombach et al. 2022).
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `Z` latent channels.

use std::ops::Range;

use candle_core::{DType, Result as CandleResult, Tensor};
use serde::Deserialize;

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Conv2d, Epilogue, GroupNorm, Linear, Loader, Mask, Padding, attention};
use crate::model::networks::check::Check;
use crate::model::networks::config::{MAX_BLOCKS, MAX_LAYERS, PerBlock, Validator};
use crate::model::networks::load_error::load_error;
use crate::model::networks::resnet::{Downsample, ResnetBlock, ResnetShape, Upsample, load_same_conv};
use crate::model::networks::tiling::{Strips, cut};

const STAGE_ENCODE: &str = "vae encode";
const STAGE_DECODE: &str = "vae decode";
const EPS: f64 = 1e-6;
/// Bounds of the logarithm of the variance.
const LOGVAR: (f64, f64) = (-30.0, 20.0);

/// Rows that are decoded at a time, at each resolution.
const STRIP: usize = 64;

/// Part of a feature map that encoder or decoder hold at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    Whole,
    /// A few rows: less than half the memory at 1024², and less the larger the image, for up to twice the work.
    Strips,
}

/// `config.json` of an `AutoencoderKL`; missing keys have diffusers' defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: usize,
    pub act_fn: String,
    pub latent_channels: usize,
    pub norm_num_groups: usize,
    /// Height and width in pixels that the network was trained at; the size of its tiles.
    pub sample_size: PerBlock<usize>,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    pub latents_mean: Option<Vec<f64>>,
    pub latents_std: Option<Vec<f64>>,
    /// True if the network overflows in f16.
    pub force_upcast: bool,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".to_owned()],
            up_block_types: vec!["UpDecoderBlock2D".to_owned()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".to_owned(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: PerBlock::Same(32),
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// # Errors
    /// `model_unsupported` for a value that this network cannot compute.
    pub fn check(&self, name: &str) -> Result<()> {
        let validator = Validator { name };
        let blocks = self.block_out_channels.len();
        validator.within("block_out_channels", blocks, 1..=MAX_BLOCKS)?;
        let kinds = [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ];
        for (key, types, known) in kinds {
            if types.len() != blocks {
                let length = types.len();
                let message =
                    format!("`{key}` must be as long as `block_out_channels`, which has {blocks}; got {length}");
                return Err(validator.refuse(message));
            }
            types.iter().try_for_each(|kind| validator.is(key, kind, &[known]))?;
        }
        for &channels in &self.block_out_channels {
            validator.channels("block_out_channels", channels)?;
            validator.divides("norm_num_groups", self.norm_num_groups, channels)?;
        }
        validator.within("layers_per_block", self.layers_per_block, 1..=MAX_LAYERS)?;
        validator.is("act_fn", &self.act_fn, &["silu", "swish"])?;
        validator.channels("in_channels", self.in_channels)?;
        validator.channels("out_channels", self.out_channels)?;
        validator.channels("latent_channels", self.latent_channels)?;
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Err(validator.refuse(format!("`scaling_factor` must be above 0, got {}", self.scaling_factor)));
        }
        if self.shift_factor.is_some_and(|shift| !shift.is_finite()) {
            return Err(validator.refuse("`shift_factor` must be finite"));
        }
        for (key, values) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            let Some(values) = values else { continue };
            let wrong = |value: &f64| !value.is_finite() || (key == "latents_std" && *value <= 0.0);
            if values.len() != self.latent_channels || values.iter().any(wrong) {
                let count = self.latent_channels;
                return Err(validator.refuse(format!("`{key}` must have {count} finite values, deviations above 0")));
            }
        }
        Ok(())
    }

    /// Pixels per latent pixel, along each side: 8 for SDXL.
    #[must_use]
    pub fn reduction(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1).min(MAX_BLOCKS)
    }

    /// Bytes of feature maps of the decoder at its largest moment, roughly, for `pixels` in numbers of `element` bytes.
    #[must_use]
    pub fn decode_bytes(&self, pixels: usize, element: usize, extent: Extent) -> usize {
        let (first, _) = self.ends();
        // A map at full size has `first` channels or, before the last level's first block, the channels of the level below.
        let below = self.block_out_channels.get(1).copied().unwrap_or(first);
        let channels = match extent {
            Extent::Whole => 2 * below + first,
            // Two maps, and some rows of the maps before and between them. The image is taken to be square.
            Extent::Strips => 2 * first + below * STRIP.min(pixels.isqrt()) / pixels.isqrt().max(1),
        };
        pixels * channels * element
    }

    /// Bytes of feature maps of the encoder at its largest moment, roughly, for `pixels` in numbers of `element` bytes.
    #[must_use]
    pub fn encode_bytes(&self, pixels: usize, element: usize, extent: Extent) -> usize {
        let (first, _) = self.ends();
        let channels = match extent {
            Extent::Whole => 3 * first,
            Extent::Strips => 2 * first + 3 * first * STRIP.min(pixels.isqrt()) / pixels.isqrt().max(1),
        };
        pixels * channels.min(3 * first) * element
    }

    /// From the encoder's scale to the UNet's: `(z - mean) · scaling_factor / std`. `z` is `[B, H, W, Z]`.
    ///
    /// # Errors
    /// Device errors.
    pub fn to_model(&self, z: &Tensor) -> Result<Tensor> {
        let run = || -> CandleResult<Tensor> {
            match self.moments(z)? {
                Some((mean, std)) => (z.broadcast_sub(&mean)? * self.scaling_factor)?.broadcast_div(&std),
                None => (z - self.shift_factor.unwrap_or(0.0))? * self.scaling_factor,
            }
        };
        run().stage(STAGE_ENCODE)
    }

    /// The inverse of [`Self::to_model`], for the decoder.
    ///
    /// # Errors
    /// Device errors.
    pub fn from_model(&self, z: &Tensor) -> Result<Tensor> {
        let run = || -> CandleResult<Tensor> {
            match self.moments(z)? {
                Some((mean, std)) => (z.broadcast_mul(&std)? / self.scaling_factor)?.broadcast_add(&mean),
                None => (z / self.scaling_factor)? + self.shift_factor.unwrap_or(0.0),
            }
        };
        run().stage(STAGE_DECODE)
    }

    /// Mean and deviation per latent channel, `[Z]` each, if the configuration has both.
    fn moments(&self, z: &Tensor) -> CandleResult<Option<(Tensor, Tensor)>> {
        let (Some(mean), Some(std)) = (&self.latents_mean, &self.latents_std) else { return Ok(None) };
        let row = |values: &[f64]| Tensor::new(values, z.device())?.to_dtype(z.dtype());
        Ok(Some((row(mean)?, row(std)?)))
    }

    fn resnet(&self, inputs: usize, outputs: usize) -> ResnetShape {
        ResnetShape { inputs, outputs, groups: self.norm_num_groups, eps: EPS, time: None }
    }

    /// Channels at the highest and at the lowest resolution.
    fn ends(&self) -> (usize, usize) {
        let at = |end: Option<&usize>| end.copied().unwrap_or(0);
        (at(self.block_out_channels.first()), at(self.block_out_channels.last()))
    }
}

/// Self-attention of one head over all positions.
#[derive(Clone, Debug)]
struct VaeAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl VaeAttention {
    /// Accepts the names of diffusers before 0.18 too.
    fn load(loader: &Loader, groups: usize, channels: usize) -> CandleResult<Self> {
        let projection = |name: &str, old: &str| {
            let now = loader.pp(name);
            let loader = if now.contains("weight") { now } else { loader.pp(old) };
            Linear::load(&loader, channels, channels)
        };
        Ok(Self {
            group_norm: GroupNorm::load(&loader.pp("group_norm"), groups, channels, EPS)?,
            to_q: projection("to_q", "query")?,
            to_k: projection("to_k", "key")?,
            to_v: projection("to_v", "value")?,
            to_out: projection("to_out.0", "proj_attn")?,
        })
    }

    /// `[B, H, W, C]` to the same.
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let residual = x.reshape((batch, height * width, channels))?;
        let normal = self.group_norm.forward(&residual)?;
        let (q, k, v) = (self.to_q.forward(&normal)?, self.to_k.forward(&normal)?, self.to_v.forward(&normal)?);
        drop(normal);
        let y = attention(&q, &k, &v, 1, Mask::None)?;
        drop((q, k, v));
        self.to_out
            .forward_with(&y, Epilogue { residual: Some(&residual), ..Epilogue::default() })?
            .reshape((batch, height, width, channels))
    }
}

#[derive(Clone, Debug)]
struct VaeMidBlock {
    before: ResnetBlock,
    attention: Option<VaeAttention>,
    after: ResnetBlock,
}

impl VaeMidBlock {
    fn load(loader: &Loader, config: &VaeConfig) -> CandleResult<Self> {
        let (_, channels) = config.ends();
        let resnet = |i: usize| ResnetBlock::load(&loader.pp("resnets").pp(i), config.resnet(channels, channels));
        let attention = config
            .mid_block_add_attention
            .then(|| VaeAttention::load(&loader.pp("attentions").pp("0"), config.norm_num_groups, channels));
        Ok(Self { before: resnet(0)?, attention: attention.transpose()?, after: resnet(1)? })
    }

    fn forward(&self, x: Tensor, stage: &'static str, check: Check) -> Result<Tensor> {
        check()?;
        let mut x = self.before.forward(x, None).stage(stage)?;
        if let Some(attention) = &self.attention {
            check()?;
            x = attention.forward(&x).stage(stage)?;
        }
        check()?;
        self.after.forward(x, None).stage(stage)
    }
}

/// Residual blocks of one resolution.
fn load_resnets(
    loader: &Loader,
    config: &VaeConfig,
    count: usize,
    (inputs, outputs): (usize, usize),
) -> CandleResult<Vec<ResnetBlock>> {
    let loader = loader.pp("resnets");
    let shape = |i| config.resnet(if i == 0 { inputs } else { outputs }, outputs);
    (0..count).map(|i| ResnetBlock::load(&loader.pp(i), shape(i))).collect()
}

/// Encodes images to latents.
#[derive(Clone, Debug)]
pub struct VaeEncoder {
    conv_in: Conv2d,
    blocks: Vec<(Vec<ResnetBlock>, Option<Downsample>)>,
    mid_block: VaeMidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
    latent_channels: usize,
    in_channels: usize,
    reduction: usize,
}

/// The distribution of an image's latents, on the encoder's scale.
#[derive(Clone, Debug)]
pub struct Moments {
    /// `[B, H/8, W/8, Z]`, f32
    pub mean: Tensor,
    /// Logarithm of the variance within -30..=20, of the same shape, f32.
    pub logvar: Tensor,
}

impl VaeEncoder {
    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &VaeConfig) -> Result<Self> {
        config.check("vae")?;
        let encoder = loader.pp("encoder");
        let (first, last) = config.ends();
        let latents = 2 * config.latent_channels;
        let block = |i: usize, outputs: usize| -> CandleResult<_> {
            let loader = encoder.pp("down_blocks").pp(i);
            let inputs = config.block_out_channels.get(i.saturating_sub(1)).copied().unwrap_or(outputs);
            let resnets = load_resnets(&loader, config, config.layers_per_block, (inputs, outputs))?;
            // Zeros at the bottom and the right alone, as the network was trained.
            let padding = Padding { bottom: 1, right: 1, ..Padding::default() };
            let downsampler = (i + 1 < config.block_out_channels.len())
                .then(|| Downsample::load(&loader.pp("downsamplers").pp("0"), outputs, padding));
            Ok((resnets, downsampler.transpose()?))
        };
        let read = || -> CandleResult<Self> {
            let quant_conv =
                config.use_quant_conv.then(|| load_same_conv(&loader.pp("quant_conv"), latents, latents, 1));
            Ok(Self {
                conv_in: load_same_conv(&encoder.pp("conv_in"), config.in_channels, first, 3)?,
                blocks: (config.block_out_channels.iter().enumerate())
                    .map(|(i, &outputs)| block(i, outputs))
                    .collect::<CandleResult<_>>()?,
                mid_block: VaeMidBlock::load(&encoder.pp("mid_block"), config)?,
                conv_norm_out: GroupNorm::load(&encoder.pp("conv_norm_out"), config.norm_num_groups, last, EPS)?,
                conv_out: load_same_conv(&encoder.pp("conv_out"), last, latents, 3)?,
                quant_conv: quant_conv.transpose()?,
                latent_channels: config.latent_channels,
                in_channels: config.in_channels,
                reduction: config.reduction(),
            })
        };
        read().map_err(load_error("vae"))
    }

    /// `x` is `[B, H, W, 3]` within -1..=1, in the dtype of the activations. `check` is called between blocks, and between
    /// strips. In strips the result differs by rounding alone.
    ///
    /// [`VaeConfig::encode_bytes`] estimates the memory of either extent.
    ///
    /// # Errors
    /// The error of `check`; device errors.
    pub fn encode(&self, x: &Tensor, extent: Extent, check: Check) -> Result<Moments> {
        match *x.dims() {
            [batch, height, width, channels]
                if batch > 0 && height >= self.reduction && width >= self.reduction && channels == self.in_channels => {
            }
            ref other => return Err(Error::bug(format!("a picture of shape {other:?} to encode"))),
        }
        let x = match extent {
            Extent::Whole => self.reduce(x, check),
            Extent::Strips => self.reduce_in_strips(x, check),
        }?;
        let x = self.mid_block.forward(x, STAGE_ENCODE, check)?;
        let finish = || -> CandleResult<Moments> {
            let mut y = self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)?;
            if let Some(quant_conv) = &self.quant_conv {
                y = quant_conv.forward(&y)?;
            }
            let y = y.to_dtype(DType::F32)?; // [B, H/8, W/8, 2Z]
            let mean = y.narrow(3, 0, self.latent_channels)?.contiguous()?;
            let logvar = y.narrow(3, self.latent_channels, self.latent_channels)?.contiguous()?;
            Ok(Moments { mean, logvar: logvar.clamp(LOGVAR.0, LOGVAR.1)? })
        };
        finish().stage(STAGE_ENCODE)
    }

    /// From pixels to the input of the middle block.
    fn reduce(&self, x: &Tensor, check: Check) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x).stage(STAGE_ENCODE)?;
        for (resnets, downsampler) in &self.blocks {
            for resnet in resnets {
                check()?;
                x = resnet.forward(x, None).stage(STAGE_ENCODE)?;
            }
            if let Some(downsampler) = downsampler {
                x = downsampler.forward(&x).stage(STAGE_ENCODE)?;
            }
        }
        Ok(x)
    }

    /// As [`Self::reduce`].
    fn reduce_in_strips(&self, pixels: &Tensor, check: Check) -> Result<Tensor> {
        let strips = |height: usize| Strips { height, rows: STRIP, stage: STAGE_ENCODE, check };
        // The first map is made by strips where it is used.
        let mut made: Option<Tensor> = None;
        let enter = |rows: &Range<usize>, strips: Strips| {
            let around = strips.around(rows, 1);
            let x = self.conv_in.forward(&cut(pixels, &(0..strips.height), &around)?)?;
            cut(&x, &around, rows)
        };
        for (resnets, downsampler) in &self.blocks {
            for resnet in resnets {
                let height = made.as_ref().unwrap_or(pixels).dim(1).stage(STAGE_ENCODE)?;
                let strips = strips(height);
                made = Some(match &made {
                    Some(x) => resnet.forward_in_strips(&|rows| cut(x, &(0..height), rows), strips)?,
                    None => resnet.forward_in_strips(&|rows| enter(rows, strips), strips)?,
                });
            }
            if let (Some(downsampler), Some(x)) = (downsampler, &made) {
                made = Some(downsampler.forward(x).stage(STAGE_ENCODE)?);
            }
        }
        made.ok_or_else(|| Error::bug("an encoder without blocks"))
    }
}

/// Decodes latents to images.
#[derive(Clone, Debug)]
pub struct VaeDecoder {
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid_block: VaeMidBlock,
    blocks: Vec<(Vec<ResnetBlock>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    latent_channels: usize,
}

impl VaeDecoder {
    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &VaeConfig) -> Result<Self> {
        config.check("vae")?;
        let decoder = loader.pp("decoder");
        let (first, last) = config.ends();
        let latents = config.latent_channels;
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let block = |i: usize, outputs: usize| -> CandleResult<_> {
            let loader = decoder.pp("up_blocks").pp(i);
            let inputs = channels.get(i.saturating_sub(1)).copied().unwrap_or(outputs);
            let resnets = load_resnets(&loader, config, config.layers_per_block + 1, (inputs, outputs))?;
            let upsampler = (i + 1 < channels.len()).then(|| Upsample::load(&loader.pp("upsamplers").pp("0"), outputs));
            Ok((resnets, upsampler.transpose()?))
        };
        let read = || -> CandleResult<Self> {
            let post = config.use_post_quant_conv;
            let post_quant_conv = post.then(|| load_same_conv(&loader.pp("post_quant_conv"), latents, latents, 1));
            Ok(Self {
                post_quant_conv: post_quant_conv.transpose()?,
                conv_in: load_same_conv(&decoder.pp("conv_in"), latents, last, 3)?,
                mid_block: VaeMidBlock::load(&decoder.pp("mid_block"), config)?,
                blocks: (channels.iter().enumerate())
                    .map(|(i, &outputs)| block(i, outputs))
                    .collect::<CandleResult<_>>()?,
                conv_norm_out: GroupNorm::load(&decoder.pp("conv_norm_out"), config.norm_num_groups, first, EPS)?,
                conv_out: load_same_conv(&decoder.pp("conv_out"), first, config.out_channels, 3)?,
                latent_channels: latents,
            })
        };
        read().map_err(load_error("vae"))
    }

    /// `z` is `[B, H, W, Z]` on the encoder's scale ([`VaeConfig::from_model`]), in the dtype of the activations; gives
    /// `[B, 8H, 8W, 3]`, about -1..=1, in the same dtype. `check` is called between blocks, and between strips.
    ///
    /// [`VaeConfig::decode_bytes`] estimates the memory of either extent.
    ///
    /// # Errors
    /// The error of `check`; device errors.
    pub fn decode(&self, z: &Tensor, extent: Extent, check: Check) -> Result<Tensor> {
        match *z.dims() {
            [.., channels] if z.rank() == 4 && z.elem_count() > 0 && channels == self.latent_channels => {}
            ref other => return Err(Error::bug(format!("latents of shape {other:?} to decode"))),
        }
        let enter = || -> CandleResult<Tensor> {
            match &self.post_quant_conv {
                Some(conv) => self.conv_in.forward(&conv.forward(z)?),
                None => self.conv_in.forward(z),
            }
        };
        let x = self.mid_block.forward(enter().stage(STAGE_DECODE)?, STAGE_DECODE, check)?;
        match extent {
            Extent::Whole => self.enlarge(x, check),
            Extent::Strips => self.enlarge_in_strips(x, check),
        }
    }

    /// From the output of the middle block to pixels.
    fn enlarge(&self, mut x: Tensor, check: Check) -> Result<Tensor> {
        for (resnets, upsampler) in &self.blocks {
            for resnet in resnets {
                check()?;
                x = resnet.forward(x, None).stage(STAGE_DECODE)?;
            }
            if let Some(upsampler) = upsampler {
                check()?;
                let (_, height, width, _) = x.dims4().stage(STAGE_DECODE)?;
                x = upsampler.forward(x, 2 * height, 2 * width).stage(STAGE_DECODE)?;
            }
        }
        check()?;
        let normal = self.conv_norm_out.forward_silu(&x).stage(STAGE_DECODE)?;
        drop(x);
        self.conv_out.forward(&normal).stage(STAGE_DECODE)
    }

    /// As [`Self::enlarge`]; the result differs by rounding alone.
    fn enlarge_in_strips(&self, mut x: Tensor, check: Check) -> Result<Tensor> {
        let strips = |height: usize| Strips { height, rows: STRIP, stage: STAGE_DECODE, check };
        // An enlarged map is made by strips where it is used.
        let mut pending: Option<&Upsample> = None;
        for (resnets, upsampler) in &self.blocks {
            for resnet in resnets {
                let height = x.dim(1).stage(STAGE_DECODE)?;
                x = match pending.take() {
                    Some(upsampler) => {
                        let strips = strips(2 * height);
                        resnet.forward_in_strips(&|rows| upsampler.rows(&x, rows, strips), strips)?
                    }
                    None => resnet.forward_in_strips(&|rows| cut(&x, &(0..height), rows), strips(height))?,
                };
            }
            pending = upsampler.as_ref();
        }
        let height = x.dim(1).stage(STAGE_DECODE)?;
        let (strips, all) = (strips(height), 0..height);
        let statistics = strips.statistics(&self.conv_norm_out, &|rows| cut(&x, &all, rows))?;
        strips.gather(&|rows| {
            let around = strips.around(rows, 1);
            let normal = self.conv_norm_out.forward_silu_by(&cut(&x, &all, &around)?, &statistics)?;
            cut(&self.conv_out.forward(&normal)?, &around, rows)
        })
    }
}
