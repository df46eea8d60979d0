//! The kernels on the CPU: many threads, f32 and bf16 activations (f16 is computed in f32), sums in f32, and no memory
//! but the result and a few MiB of blocks. Large weights stay in the format of their file, and each panel is packed for the
//! micro-kernels when a product needs it; small weights are packed once. Callers have checked all shapes.

pub(crate) mod aligned;
pub(crate) mod attention;
pub(crate) mod dequantize;
pub(crate) mod element;
pub(crate) mod elementwise;
pub(crate) mod epilogue;
pub(crate) mod gemm;
pub(crate) mod im2col;
pub(crate) mod math;
pub(crate) mod micro;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod panels;
pub(crate) mod parallel;
pub(crate) mod prefetch;
pub(crate) mod quantize;
pub(crate) mod row_block;
pub(crate) mod scratch;
pub mod simd;
pub(crate) mod softmax;
pub(crate) mod streaming_pack;
pub(crate) mod tensor_guard;
pub(crate) mod transpose;
pub(crate) mod winograd;

#[cfg(target_arch = "x86_64")]
#[doc(hidden)]
pub use self::micro::amx::probe as amx_probe;

use std::mem::MaybeUninit;

use candle_core::{D, DType, Device, Result, Shape, Tensor, WithDType};
use half::{bf16, f16};

use self::attention::{AttentionShape, AttentionTask, Tokens};
use self::element::Element;
use self::epilogue::EpilogueTensors;
use self::gemm::{GemmTask, gemm};
use self::im2col::Im2col;
use self::micro::tile::PANEL;
use self::norm::Affine;
pub(crate) use self::packed::PackedWeight;
use self::parallel::make_rows;
use self::quantize::QuantizedActivations;
use self::row_block::Dense;
use self::tensor_guard::TensorGuard;
use self::winograd::WinogradTask;
use crate::kernels::conv_shape::{ConvShape, Padding};
use crate::kernels::epilogue::{Activation, Epilogue};
use crate::kernels::mask::Mask;
use crate::kernels::running_stats::RunningStats;

/// True if these kernels support activations like `x`.
pub(crate) fn supports(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// Runs `$body` with `$t` as the type of the activations; f16 is computed in f32.
macro_rules! by_dtype {
    ($x:ident, $t:ident => $body:expr) => {
        match $x.dtype() {
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            DType::F16 => {
                let wide = $x.to_dtype(DType::F32)?;
                let $x = &wide;
                type $t = f32;
                let result: Result<Tensor> = $body;
                result?.to_dtype(DType::F16)
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}

fn tensor<T: WithDType>(numbers: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape, &Device::Cpu)
}

/// True if the kernels read the weights of a convolution in the order of the file, for feature maps of the usual size.
pub(crate) fn reads_file_order(shape: ConvShape, compute: DType) -> bool {
    winograd::supports(shape, compute == DType::BF16)
}

/// An epilogue with contiguous tensors.
struct ContiguousEpilogue {
    per_sample: Option<Tensor>,
    activation: Option<Activation>,
    residual: Option<Tensor>,
}

impl ContiguousEpilogue {
    fn new(epilogue: Epilogue, dtype: DType) -> Result<Self> {
        let Epilogue { per_sample, activation, residual } = epilogue;
        Ok(Self {
            per_sample: per_sample.map(|t| t.to_dtype(DType::F32)?.contiguous()).transpose()?,
            activation,
            residual: residual.map(|t| t.to_dtype(dtype)?.contiguous()).transpose()?,
        })
    }

    fn lock<'a>(&'a self, bias: Option<&'a Tensor>, rows_per_sample: usize, gated: bool) -> EpilogueTensors<'a> {
        EpilogueTensors {
            bias: bias.map(TensorGuard::new),
            per_sample: self.per_sample.as_ref().map(TensorGuard::new),
            activation: self.activation,
            residual: self.residual.as_ref().map(TensorGuard::new),
            rows_per_sample,
            gated,
        }
    }
}

/// The product of all axes but the first and last.
fn positions(shape: &[usize]) -> usize {
    match shape {
        [_, between @ .., _] => between.iter().product(),
        _ => 1,
    }
}

/// One call of a linear layer.
pub(crate) struct LinearTask<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) weight: &'a PackedWeight,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) epilogue: Epilogue<'a>,
    /// Multiplies the first half of the outputs by GELU of the second.
    pub(crate) gated: bool,
    /// The shape of the result.
    pub(crate) out: &'a [usize],
}

pub(crate) fn linear(task: &LinearTask) -> Result<Tensor> {
    let LinearTask { x, weight, bias, epilogue, gated, out } = *task;
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        let epilogue = ContiguousEpilogue::new(epilogue, x.dtype())?;
        let rows = out.iter().rev().skip(1).product();
        let guard = TensorGuard::new(&x);
        let fused = !gated || weight.outputs().is_multiple_of(2 * PANEL);
        let epilogue = epilogue.lock(bias, positions(out), gated && fused);
        let result = dense::<T>(guard.slice()?, weight, rows, &epilogue)?;
        // The gate is applied afterwards if values and gates share a panel.
        tensor(if fused { result } else { gate(&result, weight.outputs() / 2) }, out)
    })
}

/// The product of a matrix `[rows, depth]`. INT8 weights have each row quantized by itself.
fn dense<T: Element>(numbers: &[T], weight: &PackedWeight, rows: usize, epilogue: &EpilogueTensors) -> Result<Vec<T>> {
    let depth = weight.depth();
    if weight.is_int8() {
        let activations = QuantizedActivations::by_row(numbers, depth);
        let left = &Dense { numbers: &activations.bytes[..], depth };
        return gemm(&GemmTask { left, weight, rows, epilogue, quantized: Some(&activations) });
    }
    gemm(&GemmTask { left: &Dense { numbers, depth }, weight, rows, epilogue, quantized: None })
}

/// `[rows, 2 · half]` to `[rows, half]`: the first half times GELU of the second.
#[expect(unsafe_code, reason = "results are written to uninitialized memory")]
fn gate<T: Element>(both: &[T], half: usize) -> Vec<T> {
    let fill = |first: usize, run: &mut [MaybeUninit<T>]| {
        let mut wide = vec![0.0; 2 * half];
        for (to, from) in run.chunks_exact_mut(half).zip(both[first * 2 * half..].chunks_exact(2 * half)) {
            elementwise::widen_slice(from, &mut wide);
            let (value, gate) = wide.split_at(half);
            elementwise::gated(value, gate, to);
        }
    };
    // SAFETY: a run is whole rows, and `fill` writes each of them.
    unsafe { make_rows(both.len() / (2 * half).max(1), half, fill) }
}

/// One call of a convolution.
pub(crate) struct Conv2dTask<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) weight: &'a PackedWeight,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) shape: ConvShape,
    pub(crate) epilogue: Epilogue<'a>,
    /// The shape of the result, `[B, H', W', O]`.
    pub(crate) out: &'a [usize],
}

pub(crate) fn conv2d(task: &Conv2dTask) -> Result<Tensor> {
    let Conv2dTask { x, weight, bias, shape, epilogue, out } = *task;
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        let (_, height, width, _) = x.dims4()?;
        let (batch, out_height, out_width, _) = Shape::from(out).dims4()?;
        let epilogue = ContiguousEpilogue::new(epilogue, x.dtype())?;
        let epilogue = &epilogue.lock(bias, out_height * out_width, false);
        let guard = TensorGuard::new(&x);
        let numbers = guard.slice::<T>()?;
        let rows = batch * out_height * out_width;
        let pointwise = shape.kernel == 1 && shape.stride == 1 && shape.padding == Padding::default();
        let result = if pointwise {
            dense(numbers, weight, rows, epilogue)?
        } else if weight.is_int8() {
            // The pixels under a kernel are of many rows, so one step serves the feature map of a sample.
            let activations = QuantizedActivations::by_sample(numbers, batch, out_height * out_width);
            let left = &Im2col { numbers: &activations.bytes[..], height, width, out_height, out_width, shape };
            gemm(&GemmTask { left, weight, rows, epilogue, quantized: Some(&activations) })?
        } else if winograd::supports_weight::<T>(weight, shape, (height, width)) {
            winograd::convolve(&WinogradTask { numbers, batch, height, width, weight, epilogue })?
        } else {
            let left = &Im2col { numbers, height, width, out_height, out_width, shape };
            gemm(&GemmTask { left, weight, rows, epilogue, quantized: None })?
        };
        tensor(result, out)
    })
}

pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    /// Makes the stride of the last axis 1.
    fn with_unit_stride(t: &Tensor, dtype: DType) -> Result<Tensor> {
        let t = t.to_dtype(dtype)?;
        if t.stride().last() == Some(&1) { Ok(t) } else { t.contiguous() }
    }
    fn tokens<'a, T: Element>(guard: &'a TensorGuard, t: &Tensor) -> Result<Tokens<'a, T>> {
        let stride = t.stride();
        Ok(Tokens { numbers: guard.strided()?, sample_stride: stride[0], token_stride: stride[1] })
    }
    by_dtype!(q, T => {
        let dtype = q.dtype();
        let (q, k, v) = (with_unit_stride(q, dtype)?, with_unit_stride(k, dtype)?, with_unit_stride(v, dtype)?);
        let (batch, queries, channels) = q.dims3()?;
        let shape = AttentionShape { batch, queries, keys: k.dim(1)?, heads, depth: channels / heads };
        let guards = [&q, &k, &v].map(TensorGuard::new);
        let task = AttentionTask::<T> {
            q: tokens(&guards[0], &q)?,
            k: tokens(&guards[1], &k)?,
            v: tokens(&guards[2], &v)?,
            shape,
            mask,
        };
        tensor(attention::attention(&task), q.dims())
    })
}

/// The statistics of each sample of `x`, which is `[B, .., C]`.
pub(crate) fn running_stats(x: &Tensor) -> Result<Vec<RunningStats>> {
    let x = if x.dtype() == DType::F16 { x.to_dtype(DType::F32)?.contiguous()? } else { x.contiguous()? };
    let (guard, batch, channels) = (TensorGuard::new(&x), x.dim(0)?, x.dim(D::Minus1)?);
    match x.dtype() {
        DType::BF16 => norm::running_stats::<bf16>(&guard, batch, channels),
        _ => norm::running_stats::<f32>(&guard, batch, channels),
    }
}

/// One call of a group norm.
pub(crate) struct GroupNormTask<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) running_stats: &'a [RunningStats],
    /// `[C]`
    pub(crate) weight: &'a Tensor,
    /// `[C]`
    pub(crate) bias: &'a Tensor,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// Applies SiLU to the result.
    pub(crate) silu: bool,
}

pub(crate) fn group_norm(task: &GroupNormTask) -> Result<Tensor> {
    let GroupNormTask { x, running_stats, weight, bias, groups, eps, silu } = *task;
    let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
    let (weight, bias) = (TensorGuard::new(&weight), TensorGuard::new(&bias));
    let affine = Affine { weight: weight.slice()?, bias: bias.slice()?, eps };
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        tensor(norm::group_norm::<T>(&TensorGuard::new(&x), running_stats, groups, &affine, silu)?, x.dims())
    })
}

pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
    let (weight, bias) = (TensorGuard::new(&weight), TensorGuard::new(&bias));
    let affine = Affine { weight: weight.slice()?, bias: bias.slice()?, eps };
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        tensor(norm::layer_norm::<T>(&TensorGuard::new(&x), &affine)?, x.dims())
    })
}

pub(crate) fn activation(kind: Activation, x: &Tensor) -> Result<Tensor> {
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        let guard = TensorGuard::new(&x);
        tensor(elementwise::activate(kind, guard.slice::<T>()?), x.dims())
    })
}

/// `out` is `[B, height, width, C]`.
#[expect(unsafe_code, reason = "results are written to uninitialized memory")]
pub(crate) fn upsample_nearest(x: &Tensor, out: &[usize]) -> Result<Tensor> {
    fn run<T: Element>(x: &Tensor, out: &[usize]) -> Result<Tensor> {
        let (_, rows, columns, channels) = x.dims4()?;
        let (batch, height, width, _) = Shape::from(out).dims4()?;
        let guard = TensorGuard::new(x);
        let from = guard.slice::<T>()?;
        // torch: floor(i · from / to)
        let picks: Vec<usize> = (0..width).map(|x| x * columns / width * channels).collect();
        let fill = |first: usize, run: &mut [MaybeUninit<T>]| {
            for (i, line) in run.chunks_exact_mut(width * channels).enumerate() {
                let (sample, y) = ((first + i) / height, (first + i) % height);
                let source = &from[(sample * rows + y * rows / height) * columns * channels..];
                for (to, pick) in line.chunks_exact_mut(channels).zip(&picks) {
                    to.write_copy_of_slice(&source[*pick..*pick + channels]);
                }
            }
        };
        // SAFETY: a run is whole rows, and `fill` writes each pixel of them.
        tensor(unsafe { make_rows(batch * height, width * channels, fill) }, out)
    }
    let x = x.contiguous()?;
    match x.dtype() {
        DType::BF16 => run::<bf16>(&x, out),
        DType::F16 => run::<f16>(&x, out),
        _ => run::<f32>(&x, out),
    }
}

#[expect(unsafe_code, reason = "results are written to uninitialized memory")]
pub(crate) fn concat_channels(a: &Tensor, b: &Tensor, out: &[usize]) -> Result<Tensor> {
    fn run<T: Element>(a: &Tensor, b: &Tensor, out: &[usize]) -> Result<Tensor> {
        let (guard_a, guard_b) = (TensorGuard::new(a), TensorGuard::new(b));
        let (from_a, from_b) = (guard_a.slice::<T>()?, guard_b.slice::<T>()?);
        let total = out.last().copied().unwrap_or(0);
        let channels_a = a.dims().last().copied().unwrap_or(0);
        let channels_b = total - channels_a;
        let fill = |first: usize, run: &mut [MaybeUninit<T>]| {
            for (i, line) in run.chunks_exact_mut(total).enumerate() {
                let row = first + i;
                let (to_a, to_b) = line.split_at_mut(channels_a);
                to_a.write_copy_of_slice(&from_a[row * channels_a..(row + 1) * channels_a]);
                to_b.write_copy_of_slice(&from_b[row * channels_b..(row + 1) * channels_b]);
            }
        };
        // SAFETY: a run is whole rows, and `fill` writes both parts of each.
        tensor(unsafe { make_rows(out.iter().rev().skip(1).product(), total, fill) }, out)
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    match a.dtype() {
        DType::BF16 => run::<bf16>(&a, &b, out),
        DType::F16 => run::<f16>(&a, &b, out),
        _ => run::<f32>(&a, &b, out),
    }
}
