//! The compute seam: linear, convolution, attention, norms. Networks are written against this module, never against a
//! device. A kernel picks its implementation from the device and dtype; [`plain`] runs everywhere, and every other
//! implementation is tested against it.
//!
//! Layout: feature maps are `[B, H, W, C]`, tokens `[B, L, C]`. Weights may be kept in a narrower dtype than the
//! activations (f32 activations with f16 or bf16 weights), in eight-bit floats or in blocks of still fewer bits: on the CPU
//! each weight is widened exactly where it is used, and rounded there to the dtype in which the network computes.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `L` tokens, `O` output channels, `K` kernel side.

pub(crate) mod block_format;
pub(crate) mod cpu;
pub(crate) mod int8_policy;
pub(crate) mod load_stats;
pub(crate) mod offload;
pub mod reference;
pub(crate) mod running_stats;
pub(crate) mod shapes;
pub mod shared_layers;
pub(crate) mod stored_weight;

pub use block_format::Coding;
#[cfg(target_arch = "x86_64")]
#[doc(hidden)]
pub use cpu::amx_probe;
pub use cpu::simd;
pub use int8_policy::{Chosen, quantizing};
pub use load_stats::growing;
pub use offload::away;
pub use stored_weight::{StoredWeight, WELCOME, welcomes};

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use running_stats::RunningStats;

/// What is applied to the result of a linear layer or convolution while it is still at hand, in this order:
/// bias, `per_sample`, `activation`, `residual`.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// `[B, O]`, added to every position of its sample: the time embedding.
    pub per_sample: Option<&'a Tensor>,
    pub activation: Option<Activation>,
    /// Of the result's own shape.
    pub residual: Option<&'a Tensor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// `x · Φ(x)`, by erf
    Gelu,
    /// `x · sigmoid(1.702 x)`, as CLIP ViT-L has it
    QuickGelu,
}

impl Activation {
    /// Elementwise, in f32, cast back to the input's dtype.
    ///
    /// # Errors
    /// Those of the device.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        if cpu::serves(x) { cpu::activation(self, x) } else { reference::activation(self, x) }
    }
}

/// Weights as their device's kernels want them.
#[derive(Clone, Debug)]
enum Weight {
    /// On the CPU.
    Packed(Arc<cpu::Packed>),
    /// `[O, I]` or `[O, K, K, C]`.
    Tensor(Tensor),
    /// As the file has it, on the host; [`Weight::beside`] brings it.
    Away(offload::Away),
}

impl Weight {
    /// `weight` is `[O, I]` or `[O, C, K, K]`, of a network that computes in `compute`; `conv` the shape of its convolution.
    fn new(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<Self> {
        match weight.device().is_cpu() {
            true if offload::is_chosen() => Ok(Self::Away(offload::Away { weight: weight.clone(), compute, conv })),
            true => {
                let packed = Self::packed(weight, compute, conv)?;
                load_stats::count(weight, packed.bytes());
                Ok(Self::Packed(Arc::new(packed)))
            }
            false => Self::on_device(weight.tensor()),
        }
    }

    fn on_host(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<Self> {
        Ok(Self::Packed(Arc::new(Self::packed(weight, compute, conv)?)))
    }

    fn packed(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<cpu::Packed> {
        let by_filters = conv.is_some_and(|shape| cpu::by_filters(shape, compute));
        cpu::Packed::new(weight, compute, by_filters)
    }

    /// As [`Self::new`], of one that is on a GPU.
    fn on_device(weight: &Tensor) -> Result<Self> {
        Ok(Self::Tensor(match weight.rank() {
            4 => weight.permute((0, 2, 3, 1))?.contiguous()?, // [O, K, K, C]
            _ => weight.contiguous()?,
        }))
    }

    /// As [`Self::new`], in signed bytes.
    fn int8(weight: &Tensor) -> Result<Self> {
        if !weight.device().is_cpu() {
            candle_core::bail!("INT8 weights are for the CPU");
        }
        Ok(Self::Packed(Arc::new(cpu::Packed::int8(weight)?)))
    }

    /// Of the layer `vb`: in bytes where [`quantizing`] has it so.
    fn load(weight: &StoredWeight, vb: &VarBuilder, conv: Option<ConvShape>) -> Result<Self> {
        if !weight.device().is_cpu() || !int8_policy::is_chosen(&vb.prefix(), weight.dims()) {
            return Self::new(weight, vb.dtype(), conv);
        }
        let packed = cpu::Packed::int8(&weight.used(vb.dtype())?)?;
        int8_policy::count(weight.bytes().saturating_sub(packed.bytes()));
        load_stats::count(weight, packed.bytes());
        Ok(Self::Packed(Arc::new(packed)))
    }
}

/// `y = x · Wᵀ + b` over the last axis.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    outputs: usize,
    inputs: usize,
    /// `[O]`, f32
    bias: Option<Tensor>,
}

impl Linear {
    /// `weight` is `[O, I]`, `bias` `[O]`.
    ///
    /// # Errors
    /// Those of the cast of the bias to f32.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (size, dtype) = (weight.dims2()?, weight.dtype());
        Self::of(size, Weight::new(&StoredWeight::of(weight)?, dtype, None)?, bias)
    }

    /// Keeps each output's weights as signed bytes and a scale, and makes bytes of each row of its inputs, so that
    /// products are sums of bytes: a quarter of f32's memory, for an error of about a hundredth. On the CPU only.
    /// `weight` is `[O, I]`, `bias` `[O]`.
    ///
    /// # Errors
    /// Those of the cast of the bias to f32; weights on a GPU.
    pub fn int8(weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::of(weight.dims2()?, Weight::int8(weight)?, bias)
    }

    fn of((outputs, inputs): (usize, usize), weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let bias = bias.map(|b| offload::brought(b.to_dtype(DType::F32)?)).transpose()?;
        Ok(Self { weight, outputs, inputs, bias })
    }

    /// Reads `weight`, which may be that of a convolution of one tap, and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(vb: &VarBuilder, inputs: usize, outputs: usize) -> Result<Self> {
        shared_layers::layer(vb, || {
            let weight = Weight::load(&StoredWeight::matrix(vb, outputs, inputs)?, vb, None)?;
            Self::of((outputs, inputs), weight, Some(vb.get(outputs, "bias")?))
        })
    }

    /// Reads `weight` alone.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load_no_bias(vb: &VarBuilder, inputs: usize, outputs: usize) -> Result<Self> {
        shared_layers::layer(vb, || {
            let weight = Weight::load(&StoredWeight::matrix(vb, outputs, inputs)?, vb, None)?;
            Self::of((outputs, inputs), weight, None)
        })
    }

    /// The layer `vb`, whose `weight`, `[O, I]`, and `bias` have been read from it.
    ///
    /// # Errors
    /// Those of the cast of the bias to f32.
    pub fn named(vb: &VarBuilder, weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::of(weight.dims2()?, Weight::load(&StoredWeight::of(weight.clone())?, vb, None)?, bias)
    }

    /// `x` is `[.., I]`; gives `[.., O]` in the dtype of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Epilogue::default())
    }

    /// [`Self::forward`] with what follows it fused.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_with(&self, x: &Tensor, epilogue: Epilogue) -> Result<Tensor> {
        let out = shapes::linear(x, (self.outputs, self.inputs), self.bias.as_ref(), epilogue)?;
        if empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.beside(x)? {
            Weight::Packed(weight) => cpu::linear(x, weight, self.bias.as_ref(), epilogue, (&out, false)),
            Weight::Tensor(weight) => reference::linear(x, weight, self.bias.as_ref(), epilogue),
            Weight::Away(_) => offload::still(),
        }
    }

    /// The feed-forward gate of SDXL's transformers: the first half of the outputs times erf-GELU of the second.
    /// `x` is `[.., I]`; gives `[.., O/2]`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_geglu(&self, x: &Tensor) -> Result<Tensor> {
        let out = shapes::geglu(x, (self.outputs, self.inputs), self.bias.as_ref())?;
        if empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.beside(x)? {
            Weight::Packed(weight) => cpu::linear(x, weight, self.bias.as_ref(), Epilogue::default(), (&out, true)),
            Weight::Tensor(weight) => {
                reference::geglu(&reference::linear(x, weight, self.bias.as_ref(), Epilogue::default())?)
            }
            Weight::Away(_) => offload::still(),
        }
    }
}

/// Geometry of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    pub inputs: usize,
    pub outputs: usize,
    /// `K`: the kernel is `K × K`.
    pub kernel: usize,
    pub stride: usize,
    pub padding: Padding,
}

/// Rows and columns of zeros around the feature map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

impl Padding {
    #[must_use]
    pub const fn same(p: usize) -> Self {
        Self { top: p, bottom: p, left: p, right: p }
    }
}

/// A convolution over `[B, H, W, C]`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Weight,
    /// `[O]`, f32
    bias: Option<Tensor>,
    shape: ConvShape,
}

impl Conv2d {
    /// `weight` as files have it: `[O, C, K, K]`; it is re-laid here.
    ///
    /// # Errors
    /// Those of the re-layout.
    pub fn new(weight: &Tensor, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        shapes::kernel(weight.dims(), shape)?;
        Self::of(Weight::new(&StoredWeight::of(weight.clone())?, weight.dtype(), Some(shape))?, bias, shape)
    }

    /// As [`Linear::int8`]; bytes are made of each sample's whole feature map, or, where the kernel is one pixel, of each
    /// pixel. `weight` is `[O, C, K, K]`.
    ///
    /// # Errors
    /// A weight of another shape, or on a GPU.
    pub fn int8(weight: &Tensor, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        shapes::kernel(weight.dims(), shape)?;
        Self::of(Weight::int8(weight)?, bias, shape)
    }

    fn of(weight: Weight, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        let bias = bias.map(|b| offload::brought(b.to_dtype(DType::F32)?)).transpose()?;
        Ok(Self { weight, bias, shape })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(vb: &VarBuilder, shape: ConvShape) -> Result<Self> {
        shared_layers::layer(vb, || {
            let weight = StoredWeight::read(vb, (shape.outputs, shape.inputs, shape.kernel, shape.kernel))?;
            shapes::kernel(weight.dims(), shape)?;
            Self::of(Weight::load(&weight, vb, Some(shape))?, Some(vb.get(shape.outputs, "bias")?), shape)
        })
    }

    /// `x` is `[B, H, W, C]`; gives `[B, H', W', O]` in the dtype of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Epilogue::default())
    }

    /// [`Self::forward`] with what follows it fused.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_with(&self, x: &Tensor, epilogue: Epilogue) -> Result<Tensor> {
        let out = shapes::conv2d(x, self.bias.as_ref(), self.shape, epilogue)?;
        if empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.beside(x)? {
            Weight::Packed(weight) => cpu::conv2d(x, weight, self.bias.as_ref(), self.shape, (epilogue, &out)),
            Weight::Tensor(weight) => reference::conv2d(x, weight, self.bias.as_ref(), self.shape, epilogue),
            Weight::Away(_) => offload::still(),
        }
    }
}

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
    /// Those of the cast to f32.
    pub fn new(weight: &Tensor, bias: &Tensor, groups: usize, eps: f64) -> Result<Self> {
        let [weight, bias] = [weight, bias].map(|tensor| offload::brought(tensor.to_dtype(DType::F32)?));
        Ok(Self { weight: weight?, bias: bias?, groups, eps })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(vb: &VarBuilder, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        shared_layers::layer(vb, || Self::new(&vb.get(channels, "weight")?, &vb.get(channels, "bias")?, groups, eps))
    }

    /// `x` is `[B, .., C]`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, false)
    }

    /// [`Self::forward`], then SiLU.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, true)
    }

    /// Of `x`, a part of a feature map; [`Statistics::merge`] makes those of the whole.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn statistics(&self, x: &Tensor) -> Result<Statistics> {
        shapes::group_norm(x, &self.weight, &self.bias, self.groups)?;
        let running_stats = if cpu::serves(x) { cpu::running_stats(x)? } else { reference::running_stats(x)? };
        Ok(Statistics(running_stats))
    }

    /// [`Self::forward_silu`] of a part of a feature map that has `statistics`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_silu_by(&self, x: &Tensor, statistics: &Statistics) -> Result<Tensor> {
        shapes::group_norm(x, &self.weight, &self.bias, self.groups)?;
        let (running_stats, affine) = (&statistics.0, (&self.weight, &self.bias));
        if running_stats.len() != x.dim(0)?
            || running_stats.iter().any(|running_stats| running_stats.mean.len() != self.weight.elem_count())
        {
            candle_core::bail!("statistics of {} samples for {:?}", running_stats.len(), x.dims());
        }
        if cpu::serves(x) {
            return cpu::group_norm(x, running_stats, affine, self.groups, self.eps, true);
        }
        let normal = reference::group_norm_by(x, running_stats, affine, self.groups, self.eps)?;
        reference::activation(Activation::Silu, &normal)
    }

    fn run(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        shapes::group_norm(x, &self.weight, &self.bias, self.groups)?;
        if empty(x.dims()) {
            return Ok(x.clone());
        }
        if cpu::serves(x) {
            let running_stats = cpu::running_stats(x)?;
            return cpu::group_norm(x, &running_stats, (&self.weight, &self.bias), self.groups, self.eps, silu);
        }
        let normal = reference::group_norm(x, &self.weight, &self.bias, self.groups, self.eps)?;
        if silu { reference::activation(Activation::Silu, &normal) } else { Ok(normal) }
    }
}

/// Mean and spread of every channel of a feature map, or of a part of one.
#[derive(Clone, Debug)]
pub struct Statistics(Vec<RunningStats>);

impl Statistics {
    /// Adds those of another part, of as many samples and channels.
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
    /// Those of the cast to f32.
    pub fn new(weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Self> {
        let [weight, bias] = [weight, bias].map(|tensor| offload::brought(tensor.to_dtype(DType::F32)?));
        Ok(Self { weight: weight?, bias: bias?, eps })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(vb: &VarBuilder, channels: usize, eps: f64) -> Result<Self> {
        shared_layers::layer(vb, || Self::new(&vb.get(channels, "weight")?, &vb.get(channels, "bias")?, eps))
    }

    /// `x` is `[.., C]`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        shapes::norm(x, &self.weight, &self.bias, 1)?;
        if empty(x.dims()) {
            Ok(x.clone())
        } else if cpu::serves(x) {
            cpu::layer_norm(x, &self.weight, &self.bias, self.eps)
        } else {
            reference::layer_norm(x, &self.weight, &self.bias, self.eps)
        }
    }
}

/// Whether convolutions on the CPU read weights of this shape, `[O, C, K, K]`, in the order of the file, and lay none
/// beside them, in a network that computes in `compute`; most convolutions have a stride of 1.
#[must_use]
pub fn stays_as_stored(weight: &[usize], compute: DType) -> bool {
    let &[outputs, inputs, kernel, _] = weight else { return false };
    let padding = Padding::same(kernel / 2);
    cpu::by_filters(ConvShape { inputs, outputs, kernel, stride: 1, padding }, compute)
}

/// Bytes that a layer on the CPU keeps of a weight of this shape in `coding`, in a network that computes in `compute`;
/// `None` for parts of a block.
#[must_use]
pub fn bytes_held(weight: &[usize], coding: Coding, compute: DType) -> Option<usize> {
    let count = weight.iter().product();
    let depth = weight.iter().skip(1).product::<usize>();
    let taps = weight.iter().skip(2).product::<usize>();
    let is_read = weight.len() > 1 && (taps == 1 || stays_as_stored(weight, compute));
    match coding.dtype() {
        None if !is_read || !depth.is_multiple_of(coding.grain()) => {
            coding.bytes(count).map(|_| count * coding.widened(compute).size_in_bytes())
        }
        _ => coding.bytes(count),
    }
}

/// Whether a shape has no elements.
fn empty(shape: &[usize]) -> bool {
    shape.contains(&0)
}

/// Which keys a query may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    None,
    /// Key `j` only where `j <= i`.
    Causal,
}

/// `softmax(q kᵀ / √D) v` per head, f32 inside; the whole score matrix is never in memory.
/// `q` is `[B, Lq, heads·D]`, `k` and `v` `[B, Lk, heads·D]`; gives `[B, Lq, heads·D]`.
///
/// # Errors
/// Shapes that do not fit, or the device's own.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let out = shapes::attention(q, k, v, heads)?;
    if empty(&out) || empty(k.dims()) {
        Tensor::zeros(out, q.dtype(), q.device())
    } else if cpu::serves(q) {
        cpu::attention(q, k, v, heads, mask)
    } else {
        reference::attention(q, k, v, heads, mask)
    }
}

/// Nearest-neighbour upscaling of `[B, H, W, C]` to `[B, height, width, C]`, as torch's `interpolate` picks rows.
///
/// # Errors
/// The device's own.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let out = shapes::upsample(x, height, width)?;
    if empty(&out) {
        Tensor::zeros(out, x.dtype(), x.device())
    } else if cpu::serves(x) {
        cpu::upsample_nearest(x, &out)
    } else {
        reference::upsample_nearest(x, height, width)
    }
}

/// Joins feature maps along their channels.
///
/// # Errors
/// Shapes that do not fit, or the device's own.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = shapes::concat(a, b)?;
    if empty(&out) {
        Tensor::zeros(out, a.dtype(), a.device())
    } else if cpu::serves(a) {
        cpu::concat_channels(a, b, &out)
    } else {
        Tensor::cat(&[a, b], a.rank() - 1)
    }
}
