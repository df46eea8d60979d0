//! T2I-Adapter for SDXL (Mou et al. 2023, <https://arxiv.org/abs/2302.08453>): an image of edges, depth or the like
//! becomes features that are added to the UNet's down blocks. Names are diffusers' of `full_adapter_xl`.
//!
//! Legend: `B` batch, `H` `W` rows and columns of the image, `h` `w` of a feature map, `C` channels, `F` the factor by
//! which the image is folded.

use std::ops::RangeInclusive;

use candle_core::{Result as CandleResult, Tensor};
use serde::Deserialize;

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Conv2d, Epilogue, Loader};
use crate::model::networks::check::Check;
use crate::model::networks::config::{MAX_BLOCKS, MAX_LAYERS, Validator};
use crate::model::networks::load_error::load_error;
use crate::model::networks::resnet::load_same_conv;

const STAGE: &str = "t2i adapter";
/// 16 in every published file. Below the least, features are as large as images; above the most, an image of the
/// largest size folds to nothing.
const FACTORS: RangeInclusive<usize> = 8..=64;
/// Upper limit of a block's channels. A published one has 1280.
const MOST_CHANNELS: usize = 4096;

/// `config.json` of a T2I-Adapter; missing keys have diffusers' defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct T2iAdapterConfig {
    /// 3 for an image in colours, 1 for one in grey.
    pub in_channels: usize,
    pub channels: Vec<usize>,
    pub num_res_blocks: usize,
    /// `F`
    pub downscale_factor: usize,
    pub adapter_type: String,
}

impl Default for T2iAdapterConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            channels: vec![320, 640, 1280, 1280],
            num_res_blocks: 2,
            downscale_factor: 8,
            adapter_type: "full_adapter".to_owned(),
        }
    }
}

impl T2iAdapterConfig {
    /// # Errors
    /// `model_unsupported` for a value that this network cannot compute.
    pub fn check(&self, name: &str) -> Result<()> {
        let validator = Validator { name };
        validator.is("adapter_type", &self.adapter_type, &["full_adapter_xl"])?;
        if self.in_channels != 1 && self.in_channels != 3 {
            return Err(validator.refuse(format!("`in_channels` must be 1 or 3, got {}", self.in_channels)));
        }
        validator.within("channels", self.channels.len(), 1..=MAX_BLOCKS)?;
        self.channels.iter().try_for_each(|&channels| validator.within("channels", channels, 1..=MOST_CHANNELS))?;
        let changes = self.channels.windows(2).skip(2).any(|pair| pair.first() != pair.last());
        validator.absent("channels", changes)?;
        validator.within("num_res_blocks", self.num_res_blocks, 0..=MAX_LAYERS)?;
        validator.within("downscale_factor", self.downscale_factor, FACTORS)
    }

    /// Tensors that such a network has.
    #[must_use]
    pub fn tensors(&self) -> usize {
        let widened = (0..self.channels.len()).filter(|&at| self.inputs(at) != self.channels.get(at).copied()).count();
        2 + 2 * widened + 4 * self.num_res_blocks * self.channels.len()
    }

    /// Channels that enter a block: only the second and the third take the one before's.
    fn inputs(&self, block: usize) -> Option<usize> {
        let before = if block == 1 || block == 2 { block - 1 } else { block };
        self.channels.get(before).copied()
    }
}

/// A residual block without norms.
#[derive(Clone, Debug)]
struct Residual {
    block1: Conv2d,
    block2: Conv2d,
}

#[derive(Clone, Debug)]
struct Block {
    halves: bool,
    in_conv: Option<Conv2d>,
    resnets: Vec<Residual>,
}

/// Computes features of an image.
#[derive(Clone, Debug)]
pub struct T2iAdapter {
    conv_in: Conv2d,
    body: Vec<Block>,
    /// `F`
    factor: usize,
    /// Channels of the image.
    channels: usize,
}

impl T2iAdapter {
    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &T2iAdapterConfig) -> Result<Self> {
        config.check(STAGE)?;
        let (loader, factor) = (loader.pp("adapter"), config.downscale_factor);
        let first = config.channels.first().copied().unwrap_or(0);
        let block = |at: usize, channels: usize| -> CandleResult<Block> {
            let loader = loader.pp("body").pp(at);
            let inputs = config.inputs(at).unwrap_or(channels);
            let resnet = |i: usize| {
                let loader = loader.pp("resnets").pp(i);
                Ok(Residual {
                    block1: load_same_conv(&loader.pp("block1"), channels, channels, 3)?,
                    block2: load_same_conv(&loader.pp("block2"), channels, channels, 1)?,
                })
            };
            let in_conv = (inputs != channels).then(|| load_same_conv(&loader.pp("in_conv"), inputs, channels, 1));
            let resnets = (0..config.num_res_blocks).map(resnet).collect::<CandleResult<_>>()?;
            Ok(Block { halves: at == 2, in_conv: in_conv.transpose()?, resnets })
        };
        let read = || -> CandleResult<Self> {
            Ok(Self {
                conv_in: load_same_conv(&loader.pp("conv_in"), config.in_channels * factor * factor, first, 3)?,
                body: (config.channels.iter().enumerate())
                    .map(|(at, &channels)| block(at, channels))
                    .collect::<CandleResult<_>>()?,
                factor,
                channels: config.in_channels,
            })
        };
        read().map_err(load_error(STAGE))
    }

    /// Features of an image, `[B, H, W, C]` in `[0, 1]`: for each block `[B, h, w, C']` in the image's dtype.
    ///
    /// # Errors
    /// The error of `check`, called before each block; an image whose sides `F` does not divide; device errors.
    pub fn forward(&self, picture: &Tensor, check: Check) -> Result<Vec<Tensor>> {
        let &[_, height, width, channels] = picture.dims() else {
            return Err(Error::bug(format!("a picture of shape {:?}", picture.dims())));
        };
        let even = |side: usize| side > 0 && side.is_multiple_of(self.factor);
        if channels != self.channels || !even(height) || !even(width) {
            let (wanted, factor) = (self.channels, self.factor);
            let shape = picture.dims();
            return Err(Error::bug(format!("a picture of shape {shape:?} for {wanted} channels and factor {factor}")));
        }
        check()?;
        let folded = fold(picture, self.factor).and_then(|folded| self.conv_in.forward(&folded));
        let mut x = folded.stage(STAGE)?;
        let mut features = Vec::with_capacity(self.body.len());
        for block in &self.body {
            check()?;
            x = block.forward(x).stage(STAGE)?;
            features.push(x.clone());
        }
        Ok(features)
    }
}

impl Block {
    fn forward(&self, mut x: Tensor) -> CandleResult<Tensor> {
        if self.halves {
            x = halved(&x)?;
        }
        if let Some(in_conv) = &self.in_conv {
            x = in_conv.forward(&x)?;
        }
        for resnet in &self.resnets {
            let inner = resnet.block1.forward(&x)?.relu()?;
            x = resnet.block2.forward_with(&inner, Epilogue { residual: Some(&x), ..Epilogue::default() })?;
        }
        Ok(x)
    }
}

/// Squares of `factor` pixels become channels, the image's own channel outermost: torch's `PixelUnshuffle`.
fn fold(x: &Tensor, factor: usize) -> CandleResult<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let (h, w) = (height / factor, width / factor);
    x.reshape(&[batch, h, factor, w, factor, channels][..])?.permute(vec![0, 1, 3, 5, 2, 4])?.reshape((
        batch,
        h,
        w,
        channels * factor * factor,
    ))
}

/// Means of two by two positions; at an odd border, of the positions within the map.
fn halved(x: &Tensor) -> CandleResult<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    // The mean of a border and its copy is the border.
    let x = x.pad_with_same(1, 0, height % 2)?.pad_with_same(2, 0, width % 2)?;
    let (batch, height, width, channels) = x.dims4()?;
    let (h, w) = (height / 2, width / 2);
    let sum = x.reshape(&[batch, h, 2, w, 2, channels][..])?.sum(4)?.sum(2)?;
    sum * 0.25
}
