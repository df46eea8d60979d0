//! The convolutional parts that UNet and VAE share: the residual block, and the steps between resolutions.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `O` output channels, `T` width of the time embedding.

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::error::Result as StagedResult;
use crate::kernels::{Conv2d, ConvShape, Epilogue, GroupNorm, Linear, Loader, Padding, upsample_nearest};
use crate::model::networks::tiling::{RowSource, Strips, cut};

/// A convolution that keeps height and width. `kernel` is odd.
///
/// # Errors
/// A missing tensor, or one of another shape.
pub(crate) fn load_same_conv(loader: &Loader, inputs: usize, outputs: usize, kernel: usize) -> Result<Conv2d> {
    let padding = Padding::same(kernel.saturating_sub(1) / 2);
    Conv2d::load(loader, ConvShape { inputs, outputs, kernel, stride: 1, padding })
}

/// Sizes of a residual block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetShape {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// `T`; `None` in the VAE, which knows no time.
    pub(crate) time: Option<usize>,
}

/// Norm, SiLU, convolution, twice, with the time embedding added between and the input around.
#[derive(Clone, Debug)]
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, shape: ResnetShape) -> Result<Self> {
        let ResnetShape { inputs, outputs, groups, eps, time } = shape;
        let shortcut = (inputs != outputs).then(|| load_same_conv(&loader.pp("conv_shortcut"), inputs, outputs, 1));
        Ok(Self {
            norm1: GroupNorm::load(&loader.pp("norm1"), groups, inputs, eps)?,
            conv1: load_same_conv(&loader.pp("conv1"), inputs, outputs, 3)?,
            time_emb_proj: time.map(|t| Linear::load(&loader.pp("time_emb_proj"), t, outputs)).transpose()?,
            norm2: GroupNorm::load(&loader.pp("norm2"), groups, outputs, eps)?,
            conv2: load_same_conv(&loader.pp("conv2"), outputs, outputs, 3)?,
            conv_shortcut: shortcut.transpose()?,
        })
    }

    /// `x` is `[B, H, W, C]`; gives `[B, H, W, O]`. `time` is `[B, T]`, SiLU already applied, in the dtype of `x`.
    ///
    /// At most three feature maps are alive at a time, if the caller keeps none: `x` is consumed.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub(crate) fn forward(&self, x: Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let per_sample = match (&self.time_emb_proj, time) {
            (Some(projection), Some(time)) => Some(projection.forward(time)?), // [B, O]
            _ => None,
        };
        let normal = self.norm1.forward_silu(&x)?;
        let epilogue = Epilogue { per_sample: per_sample.as_ref(), ..Epilogue::default() };
        let hidden = self.conv1.forward_with(&normal, epilogue)?;
        drop(normal);
        let residual = match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(&x)?,
            None => x.clone(),
        };
        drop(x);
        let normal = self.norm2.forward_silu(&hidden)?;
        drop(hidden);
        self.conv2.forward_with(&normal, Epilogue { residual: Some(&residual), ..Epilogue::default() })
    }

    /// [`Self::forward`] without a time embedding, of a map of which `source` gives rows.
    ///
    /// # Errors
    /// The error of the strips' `check`; shapes that do not fit; device errors.
    pub(crate) fn forward_in_strips(&self, source: RowSource, strips: Strips) -> StagedResult<Tensor> {
        let first = strips.statistics(&self.norm1, source)?;
        let hidden = |x: &Tensor, has: &Range<usize>, wanted: &Range<usize>| {
            cut(&self.conv1.forward(&self.norm1.forward_silu_by(x, &first)?)?, has, wanted)
        };
        let second = strips.statistics(&self.norm2, &|rows| {
            let around = strips.around(rows, 1);
            hidden(&source(&around)?, &around, rows)
        })?;
        strips.gather(&|rows| {
            let (wide, around) = (strips.around(rows, 2), strips.around(rows, 1));
            let x = source(&wide)?;
            let normal = self.norm2.forward_silu_by(&hidden(&x, &wide, &around)?, &second)?;
            let x = cut(&x, &wide, &around)?;
            let residual = match &self.conv_shortcut {
                Some(shortcut) => shortcut.forward(&x)?,
                None => x,
            };
            let y = self.conv2.forward_with(&normal, Epilogue { residual: Some(&residual), ..Epilogue::default() })?;
            cut(&y, &around, rows)
        })
    }
}

/// Halves height and width by a strided convolution.
#[derive(Clone, Debug)]
pub(crate) struct Downsample {
    conv: Conv2d,
}

impl Downsample {
    /// The UNet pads every side by one, the VAE's encoder the bottom and the right alone.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, channels: usize, padding: Padding) -> Result<Self> {
        let shape = ConvShape { inputs: channels, outputs: channels, kernel: 3, stride: 2, padding };
        Ok(Self { conv: Conv2d::load(&loader.pp("conv"), shape)? })
    }

    /// # Errors
    /// Shapes that do not fit; device errors.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(x)
    }
}

/// Enlarges to a given size by repeating pixels, then convolves.
#[derive(Clone, Debug)]
pub(crate) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, channels: usize) -> Result<Self> {
        Ok(Self { conv: load_same_conv(&loader.pp("conv"), channels, channels, 3)? })
    }

    /// # Errors
    /// Shapes that do not fit; device errors.
    pub(crate) fn forward(&self, x: Tensor, height: usize, width: usize) -> Result<Tensor> {
        let enlarged = upsample_nearest(&x, height, width)?;
        drop(x);
        self.conv.forward(&enlarged)
    }
    /// Rows `rows` of the result of [`Self::forward`] for twice the height and width, which `strips` cut.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub(crate) fn rows(&self, x: &Tensor, rows: &Range<usize>, strips: Strips) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        let around = strips.around(rows, 1);
        let low = around.start / 2..around.end.div_ceil(2);
        let y = self.forward(cut(x, &(0..height), &low)?, 2 * low.len(), 2 * width)?;
        cut(&y, &(2 * low.start..2 * low.end), rows)
    }
}
