//! The kernels on the CPU: many threads, f32 and bf16 activations (f16 goes through f32), sums in f32, and nothing but
//! the result and a few MiB of blocks in memory. Weights stay as they are stored where they are large, and are laid for the
//! micro-kernels a panel at a time, when a product comes to it; what is small is laid once.
//!
//! Shapes have been checked by the caller.

pub(crate) mod attention;
pub(crate) mod dequantize;
pub(crate) mod element;
pub(crate) mod epilogue;
pub(crate) mod gemm;
pub(crate) mod im2col;
pub(crate) mod micro;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod parallel;
pub(crate) mod quantize;
pub mod simd;
pub(crate) mod softmax;
pub(crate) mod streaming_pack;
pub(crate) mod winograd;

#[cfg(target_arch = "x86_64")]
#[doc(hidden)]
pub use self::micro::amx::probe as amx_probe;

use candle_core::{D, DType, Result, Tensor, WithDType};
use half::{bf16, f16};

use self::attention::{Size, Tokens};
use self::element::{Element, Held};
use self::gemm::{After, Dense, product};
use self::im2col::Patches;
use self::micro::PANEL;
use self::norm::Affine;
pub(crate) use self::packed::Packed;
use self::parallel::make_rows;
use self::quantize::Bytes;
use crate::kernels::running_stats::RunningStats;
use crate::kernels::{Activation, ConvShape, Epilogue, Mask, Padding, StoredWeight};

/// Whether these kernels take activations like `x`.
pub(crate) fn serves(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// Runs `$body` with `$t` as the activations' type, f16 by way of f32.
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
                let made: Result<Tensor> = $body;
                made?.to_dtype(DType::F16)
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}

fn tensor<T: WithDType>(numbers: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape, &candle_core::Device::Cpu)
}

/// The numbers of a weight, rounded once to `dtype`, which is f32, bf16 or f16.
pub(crate) fn numbers(weight: &StoredWeight, dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::BF16 => tensor(dequantize::numbers::<bf16>(weight)?, weight.dims()),
        DType::F16 => tensor(dequantize::numbers::<f16>(weight)?, weight.dims()),
        _ => tensor(dequantize::numbers::<f32>(weight)?, weight.dims())?.to_dtype(dtype),
    }
}

/// Whether the kernels read the weights of a convolution in the order of the file, for feature maps of the usual size.
pub(crate) fn by_filters(shape: ConvShape, compute: DType) -> bool {
    winograd::fits(shape, compute == DType::BF16)
}

/// `epilogue` with tensors whose memory can be read in order.
struct Ordered {
    per_sample: Option<Tensor>,
    activation: Option<Activation>,
    residual: Option<Tensor>,
}

impl Ordered {
    fn new(epilogue: Epilogue, dtype: DType) -> Result<Self> {
        let Epilogue { per_sample, activation, residual } = epilogue;
        Ok(Self {
            per_sample: per_sample.map(|t| t.to_dtype(DType::F32)?.contiguous()).transpose()?,
            activation,
            residual: residual.map(|t| t.to_dtype(dtype)?.contiguous()).transpose()?,
        })
    }

    fn after<'a>(&'a self, bias: Option<&'a Tensor>, sample: usize, gated: bool) -> After<'a> {
        After {
            bias: bias.map(Held::new),
            per_sample: self.per_sample.as_ref().map(Held::new),
            activation: self.activation,
            residual: self.residual.as_ref().map(Held::new),
            sample,
            gated,
            bytes: None,
        }
    }
}

/// Elements of all axes but the first and last.
fn positions(shape: &[usize]) -> usize {
    match shape {
        [_, between @ .., _] => between.iter().product(),
        _ => 1,
    }
}

/// `gated`: the first half of the outputs times GELU of the second.
pub(crate) fn linear(
    x: &Tensor,
    weight: &Packed,
    bias: Option<&Tensor>,
    epilogue: Epilogue,
    (out, gated): (&[usize], bool),
) -> Result<Tensor> {
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        let ordered = Ordered::new(epilogue, x.dtype())?;
        let rows = out.iter().rev().skip(1).product();
        let held = Held::new(&x);
        let fused = !gated || weight.outputs().is_multiple_of(2 * PANEL);
        let after = ordered.after(bias, positions(out), gated && fused);
        let made = dense::<T>(held.slice()?, weight, rows, after)?;
        // Where values and gates do not fall into panels of their own, they meet afterwards.
        tensor(if fused { made } else { gate(&made, weight.outputs() / 2) }, out)
    })
}

/// The product of a matrix `[rows, depth]`, each row for itself.
fn dense<T: Element>(numbers: &[T], weight: &Packed, rows: usize, after: After) -> Result<Vec<T>> {
    let depth = weight.depth();
    if weight.is_int8() {
        let bytes = Bytes::by_row(numbers, depth);
        let left = Dense { numbers: &bytes.numbers[..], depth };
        return product(&left, weight, rows, &After { bytes: Some(&bytes), ..after });
    }
    product(&Dense { numbers, depth }, weight, rows, &after)
}

/// `[rows, 2 · half]` to `[rows, half]`: the first half times GELU of the second.
fn gate<T: Element>(both: &[T], half: usize) -> Vec<T> {
    make_rows(both.len() / (2 * half).max(1), half, |first, run| {
        let mut wide = vec![0.0; 2 * half];
        for (to, from) in run.chunks_exact_mut(half).zip(both[first * 2 * half..].chunks_exact(2 * half)) {
            simd::widen_slice(from, &mut wide);
            let (value, gate) = wide.split_at(half);
            simd::gated(value, gate, to);
        }
    })
}

/// `out` is `[B, H', W', O]`.
pub(crate) fn conv2d(
    x: &Tensor,
    weight: &Packed,
    bias: Option<&Tensor>,
    shape: ConvShape,
    (epilogue, out): (Epilogue, &[usize]),
) -> Result<Tensor> {
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        let (_, height, width, _) = x.dims4()?;
        let (batch, out_height, out_width, _) = candle_core::Shape::from(out).dims4()?;
        let ordered = Ordered::new(epilogue, x.dtype())?;
        let after = ordered.after(bias, out_height * out_width, false);
        let held = Held::new(&x);
        let numbers = held.slice::<T>()?;
        let rows = batch * out_height * out_width;
        let pointwise = shape.kernel == 1 && shape.stride == 1 && shape.padding == Padding::default();
        let made = if pointwise {
            dense(numbers, weight, rows, after)?
        } else if weight.is_int8() {
            // A patch has pixels of many rows, so the whole map has one step: a result depends on its own sample only.
            let bytes = Bytes::by_sample(numbers, batch, out_height * out_width);
            let left = Patches { numbers: &bytes.numbers[..], height, width, out_height, out_width, shape };
            product(&left, weight, rows, &After { bytes: Some(&bytes), ..after })?
        } else if winograd::serves::<T>(weight, shape, (height, width)) {
            winograd::convolve(numbers, (batch, height, width), weight, &after)?
        } else {
            product(&Patches { numbers, height, width, out_height, out_width, shape }, weight, rows, &after)?
        };
        tensor(made, out)
    })
}

pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    /// With unit stride in the last axis, whatever the others.
    fn ready(t: &Tensor, dtype: DType) -> Result<Tensor> {
        let t = t.to_dtype(dtype)?;
        if t.stride().last() == Some(&1) { Ok(t) } else { t.contiguous() }
    }
    fn tokens<'a, T: Element>(held: &'a Held, t: &Tensor) -> Result<Tokens<'a, T>> {
        let stride = t.stride();
        Ok(Tokens { numbers: held.strided()?, sample_stride: stride[0], token_stride: stride[1] })
    }
    by_dtype!(q, T => {
        let (q, k, v) = (ready(q, q.dtype())?, ready(k, q.dtype())?, ready(v, q.dtype())?);
        let (batch, queries, channels) = q.dims3()?;
        let size = Size { batch, queries, keys: k.dim(1)?, heads, depth: channels / heads };
        let (held_q, held_k, held_v) = (Held::new(&q), Held::new(&k), Held::new(&v));
        let made = attention::attention::<T>(
            tokens(&held_q, &q)?,
            tokens(&held_k, &k)?,
            tokens(&held_v, &v)?,
            size,
            mask,
        );
        tensor(made, q.dims())
    })
}

/// One tally a sample of `x`, which is `[B, .., C]`.
pub(crate) fn running_stats(x: &Tensor) -> Result<Vec<RunningStats>> {
    let x = if x.dtype() == DType::F16 { x.to_dtype(DType::F32)?.contiguous()? } else { x.contiguous()? };
    let (held, batch, channels) = (Held::new(&x), x.dim(0)?, x.dim(D::Minus1)?);
    match x.dtype() {
        DType::BF16 => norm::running_stats::<bf16>(&held, batch, channels),
        _ => norm::running_stats::<f32>(&held, batch, channels),
    }
}

pub(crate) fn group_norm(
    x: &Tensor,
    running_stats: &[RunningStats],
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
    let (weight, bias) = (Held::new(&weight), Held::new(&bias));
    let affine = Affine { weight: weight.slice()?, bias: bias.slice()?, eps };
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        tensor(norm::group_norm::<T>(&Held::new(&x), running_stats, groups, &affine, silu)?, x.dims())
    })
}

pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
    let (weight, bias) = (Held::new(&weight), Held::new(&bias));
    let affine = Affine { weight: weight.slice()?, bias: bias.slice()?, eps };
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        tensor(norm::layer_norm::<T>(&Held::new(&x), &affine)?, x.dims())
    })
}

pub(crate) fn activation(kind: Activation, x: &Tensor) -> Result<Tensor> {
    by_dtype!(x, T => {
        let x = x.contiguous()?;
        let held = Held::new(&x);
        let from = held.slice::<T>()?;
        let made = make_rows::<T>(from.len(), 1, |first, out| {
            simd::activate_into(kind, &from[first..first + out.len()], out);
        });
        tensor(made, x.dims())
    })
}

/// `out` is `[B, height, width, C]`.
pub(crate) fn upsample_nearest(x: &Tensor, out: &[usize]) -> Result<Tensor> {
    fn run<T: Element>(x: &Tensor, out: &[usize]) -> Result<Tensor> {
        let (_, rows, columns, channels) = x.dims4()?;
        let (batch, height, width, _) = candle_core::Shape::from(out).dims4()?;
        let held = Held::new(x);
        let from = held.slice::<T>()?;
        // torch: floor(i · from / to)
        let picks: Vec<usize> = (0..width).map(|x| x * columns / width * channels).collect();
        let made = make_rows::<T>(batch * height, width * channels, |first, run| {
            for (i, line) in run.chunks_exact_mut(width * channels).enumerate() {
                let (sample, y) = ((first + i) / height, (first + i) % height);
                let source = &from[(sample * rows + y * rows / height) * columns * channels..];
                for (to, pick) in line.chunks_exact_mut(channels).zip(&picks) {
                    to.copy_from_slice(&source[*pick..*pick + channels]);
                }
            }
        });
        tensor(made, out)
    }
    let x = x.contiguous()?;
    match x.dtype() {
        DType::BF16 => run::<bf16>(&x, out),
        DType::F16 => run::<f16>(&x, out),
        _ => run::<f32>(&x, out),
    }
}

pub(crate) fn concat_channels(a: &Tensor, b: &Tensor, out: &[usize]) -> Result<Tensor> {
    fn run<T: Element>(a: &Tensor, b: &Tensor, out: &[usize]) -> Result<Tensor> {
        let (held_a, held_b) = (Held::new(a), Held::new(b));
        let (from_a, from_b) = (held_a.slice::<T>()?, held_b.slice::<T>()?);
        let total = out.last().copied().unwrap_or(0);
        let of_a = a.dims().last().copied().unwrap_or(0);
        let of_b = total - of_a;
        let made = make_rows::<T>(out.iter().rev().skip(1).product(), total, |first, run| {
            for (i, line) in run.chunks_exact_mut(total).enumerate() {
                let row = first + i;
                let (to_a, to_b) = line.split_at_mut(of_a);
                to_a.copy_from_slice(&from_a[row * of_a..(row + 1) * of_a]);
                to_b.copy_from_slice(&from_b[row * of_b..(row + 1) * of_b]);
            }
        });
        tensor(made, out)
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    match a.dtype() {
        DType::BF16 => run::<bf16>(&a, &b, out),
        DType::F16 => run::<f16>(&a, &b, out),
        _ => run::<f32>(&a, &b, out),
    }
}
