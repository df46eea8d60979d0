//! Embeddings of numbers: diffusion time and SDXL's size conditions.
//!
//! Legend: `B` batch, `N` numbers per sample, `D` width of one number's embedding, `T` width of the time embedding.

use candle_core::{DType, Device, Result, Tensor};

use crate::kernels::{Activation, Epilogue, Linear, Loader};
use crate::model::networks::unet_config::{UnetConfig, UnetPlan};

/// The longest wavelength of a sinusoidal embedding, over 2π (Vaswani et al. 2017, section 3.5).
const MAX_PERIOD: f64 = 10_000.0;

/// Sines and cosines of a number at `D / 2` frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sinusoid {
    /// `D`; the last value is zero where `D` is odd.
    pub width: usize,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Frequency `i` is `10000^(-i / (D/2 - freq_shift))`. Must be below `D / 2`.
    pub freq_shift: f64,
}

impl Sinusoid {
    /// Gives `[B, N · D]` in f32 for `B` rows of `N` numbers.
    ///
    /// Angles are f32, as torch's are: at timestep 999 that is 6e-5 from the real angle, and the network was trained so.
    ///
    /// # Errors
    /// Rows of unequal length; device errors.
    pub fn embed<'a>(self, rows: impl IntoIterator<Item = &'a [f64]>, device: &Device) -> Result<Tensor> {
        let half = self.width / 2;
        let log_period = -MAX_PERIOD.ln() as f32;
        let span = (half as f64 - self.freq_shift) as f32;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let exponent = log_period * i as f32 / span;
                f64::from(exponent).exp() as f32
            })
            .collect();
        let mut values = Vec::new();
        let mut batch = 0;
        for row in rows {
            batch += 1;
            for &number in row {
                let angles = || frequencies.iter().map(|frequency| f64::from(number as f32 * frequency));
                let sines = angles().map(|angle| angle.sin() as f32);
                let cosines = angles().map(|angle| angle.cos() as f32);
                if self.flip_sin_to_cos {
                    values.extend(cosines.chain(sines));
                } else {
                    values.extend(sines.chain(cosines));
                }
                if self.width % 2 == 1 {
                    values.push(0.0);
                }
            }
        }
        let width = values.len() / batch.max(1);
        Tensor::from_vec(values, (batch, width), device)
    }
}

/// Two linear layers with SiLU between them.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(loader: &Loader, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::load(&loader.pp("linear_1"), inputs, outputs)?,
            linear_2: Linear::load(&loader.pp("linear_2"), outputs, outputs)?,
        })
    }

    /// `[B, I]` to `[B, T]`, in f32.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let activated =
            self.linear_1.forward_with(&x, Epilogue { activation: Some(Activation::Silu), ..Epilogue::default() })?;
        self.linear_2.forward(&activated)
    }
}

/// The numbers of one evaluation, for each sample of a batch.
#[derive(Clone, Copy)]
pub(crate) struct StepNumbers<'a> {
    /// One for all samples, or one for each.
    pub(crate) timesteps: &'a [f64],
    /// `[B, P]`: the pooled text.
    pub(crate) pooled: &'a Tensor,
    pub(crate) time_ids: &'a [Vec<f64>],
}

/// Embedding of the timestep and of SDXL's added conditioning, for every residual block.
#[derive(Clone, Debug)]
pub(crate) struct StepEmbedding {
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    pub(crate) add_time_proj: Sinusoid,
    add_embedding: TimestepEmbedding,
}

impl StepEmbedding {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, config: &UnetConfig, plan: &UnetPlan) -> Result<Self> {
        let (width, time) = (plan.down.first().map_or(0, |block| block.outputs), plan.sizes.time);
        let sinusoid =
            |width| Sinusoid { width, flip_sin_to_cos: config.flip_sin_to_cos, freq_shift: config.freq_shift };
        Ok(Self {
            time_proj: sinusoid(width),
            time_embedding: TimestepEmbedding::load(&loader.pp("time_embedding"), width, time)?,
            add_time_proj: sinusoid(plan.addition),
            add_embedding: TimestepEmbedding::load(&loader.pp("add_embedding"), plan.projection, time)?,
        })
    }

    /// `[B, T]`, f32, without the SiLU that every residual block begins with.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub(crate) fn embed(&self, numbers: StepNumbers, device: &Device) -> Result<Tensor> {
        let StepNumbers { timesteps, pooled, time_ids } = numbers;
        let times = (0..time_ids.len()).map(|i| match timesteps {
            [one] => std::slice::from_ref(one),
            each => each.get(i..=i).unwrap_or_default(),
        });
        let time = self.time_embedding.forward(&self.time_proj.embed(times, device)?)?;
        let sizes = self.add_time_proj.embed(time_ids.iter().map(Vec::as_slice), device)?;
        let added = Tensor::cat(&[&pooled.to_dtype(DType::F32)?, &sizes], 1)?; // [B, P + N·D]
        time + self.add_embedding.forward(&added)?
    }
}
