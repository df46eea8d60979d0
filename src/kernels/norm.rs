//! Group norm and layer norm.

use candle_core::{DType, Result, Tensor};

use crate::kernels::epilogue::Activation;
use crate::kernels::loader::Loader;
use crate::kernels::running_stats::RunningStats;
use crate::kernels::{cpu, reference, shapes};

/// Normalisation over groups of channels and all positions, in f32.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// `[C]`, f32
    weight: Tensor,
    /// `[C]`, f32
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// `weight` and `bias` are `[C]`.
    ///
    /// # Errors
    /// Errors of the cast to f32.
    pub fn new(weight: &Tensor, bias: &Tensor, groups: usize, eps: f64) -> Result<Self> {
        let [weight, bias] = [weight, bias].map(|tensor| tensor.to_dtype(DType::F32));
        Ok(Self { weight: weight?, bias: bias?, groups, eps })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(loader: &Loader, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        let (weight, bias) = loader.affine(channels)?;
        Ok(Self { weight, bias, groups, eps })
    }

    /// `x` is `[B, .., C]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, false)
    }

    /// [`Self::forward`], then SiLU.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, true)
    }

    /// Statistics of `x`, a part of a feature map; [`Statistics::merge`] combines them to the whole map's.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn statistics(&self, x: &Tensor) -> Result<Statistics> {
        shapes::group_norm(x, &self.weight, &self.bias, self.groups)?;
        let running_stats = if cpu::supports(x) { cpu::running_stats(x)? } else { reference::running_stats(x)? };
        Ok(Statistics(running_stats))
    }

    /// [`Self::forward_silu`] of a part of a feature map that has `statistics`.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward_silu_by(&self, x: &Tensor, statistics: &Statistics) -> Result<Tensor> {
        shapes::group_norm(x, &self.weight, &self.bias, self.groups)?;
        let (running_stats, affine) = (&statistics.0, (&self.weight, &self.bias));
        if running_stats.len() != x.dim(0)?
            || running_stats.iter().any(|running_stats| running_stats.mean.len() != self.weight.elem_count())
        {
            candle_core::bail!("statistics of {} samples for {:?}", running_stats.len(), x.dims());
        }
        if cpu::supports(x) {
            return cpu::group_norm(&self.task(x, running_stats, true));
        }
        let normal = reference::group_norm_by(x, running_stats, affine, self.groups, self.eps)?;
        reference::activation(Activation::Silu, &normal)
    }

    fn task<'a>(&'a self, x: &'a Tensor, running_stats: &'a [RunningStats], silu: bool) -> cpu::GroupNormTask<'a> {
        let Self { weight, bias, groups, eps } = self;
        cpu::GroupNormTask { x, running_stats, weight, bias, groups: *groups, eps: *eps, silu }
    }

    fn run(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        shapes::group_norm(x, &self.weight, &self.bias, self.groups)?;
        if shapes::is_empty(x.dims()) {
            return Ok(x.clone());
        }
        if cpu::supports(x) {
            let running_stats = cpu::running_stats(x)?;
            return cpu::group_norm(&self.task(x, &running_stats, silu));
        }
        let normal = reference::group_norm(x, &self.weight, &self.bias, self.groups, self.eps)?;
        if silu { reference::activation(Activation::Silu, &normal) } else { Ok(normal) }
    }
}

/// Mean and spread of every channel of a feature map, or of a part of one.
#[derive(Clone, Debug)]
pub struct Statistics(Vec<RunningStats>);

impl Statistics {
    /// Adds the statistics of another part, with as many samples and channels.
    pub fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(ours, other)| ours.merge(other));
    }
}

/// Normalisation over the last axis, in f32.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[C]`, f32
    weight: Tensor,
    /// `[C]`, f32
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// `weight` and `bias` are `[C]`.
    ///
    /// # Errors
    /// Errors of the cast to f32.
    pub fn new(weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Self> {
        let [weight, bias] = [weight, bias].map(|tensor| tensor.to_dtype(DType::F32));
        Ok(Self { weight: weight?, bias: bias?, eps })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(loader: &Loader, channels: usize, eps: f64) -> Result<Self> {
        let (weight, bias) = loader.affine(channels)?;
        Ok(Self { weight, bias, eps })
    }

    /// `x` is `[.., C]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        shapes::norm(x, &self.weight, &self.bias, 1)?;
        if shapes::is_empty(x.dims()) {
            Ok(x.clone())
        } else if cpu::supports(x) {
            cpu::layer_norm(x, &self.weight, &self.bias, self.eps)
        } else {
            reference::layer_norm(x, &self.weight, &self.bias, self.eps)
        }
    }
}
