//! Every kernel composed of candle's own operations: slow, short, and right on every device. Every other implementation is tested against it.
//!
//! Arithmetic is f32 whatever the dtypes, and the result is cast to the dtype of the activations, except on a GPU,
//! where matrix products run in the activations' dtype (the device accumulates in f32).

use candle_core::{D, DType, Result, Tensor};

use crate::kernels::conv_shape::ConvShape;
use crate::kernels::epilogue::{Activation, Epilogue};
use crate::kernels::mask::Mask;
use crate::kernels::running_stats::{GroupStats, RunningStats};

/// Scores held at a time by [`attention`], in elements.
const SCORE_BLOCK: usize = 1 << 24;

/// The dtype in which matrix products of activations like `x` are made.
fn product_dtype(x: &Tensor) -> DType {
    if x.device().is_cpu() { DType::F32 } else { x.dtype() }
}

pub fn activation(kind: Activation, x: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let y = match kind {
        Activation::Silu => wide.silu()?,
        Activation::Gelu => wide.gelu_erf()?,
        Activation::QuickGelu => (&wide * candle_nn::ops::sigmoid(&(&wide * 1.702)?)?)?,
    };
    y.to_dtype(x.dtype())
}

/// `y` is `[B, .., O]`; gives it in `dtype`.
fn finish(y: Tensor, bias: Option<&Tensor>, epilogue: Epilogue, dtype: DType) -> Result<Tensor> {
    let mut y = y.to_dtype(DType::F32)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(per_sample) = epilogue.per_sample {
        let (batch, channels) = per_sample.dims2()?;
        let mut shape = vec![1; y.rank()];
        shape[0] = batch;
        shape[y.rank() - 1] = channels;
        y = y.broadcast_add(&per_sample.to_dtype(DType::F32)?.reshape(shape)?)?;
    }
    if let Some(kind) = epilogue.activation {
        y = activation(kind, &y)?;
    }
    if let Some(residual) = epilogue.residual {
        y = (y + residual.to_dtype(DType::F32)?)?;
    }
    y.to_dtype(dtype)
}

pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<Tensor> {
    let dtype = product_dtype(x);
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inputs.max(1);
    let flat = x.reshape((rows, inputs))?.to_dtype(dtype)?;
    let y = flat.matmul(&weight.to_dtype(dtype)?.t()?)?; // [rows, O]
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    finish(y.reshape(shape)?, bias, epilogue, x.dtype())
}

/// `y` is `[.., 2n]`; gives `[.., n]`.
pub fn geglu(y: &Tensor) -> Result<Tensor> {
    let half = y.dim(D::Minus1)? / 2;
    let value = y.narrow(D::Minus1, 0, half)?.to_dtype(DType::F32)?;
    let gate = y.narrow(D::Minus1, half, half)?.to_dtype(DType::F32)?.contiguous()?.gelu_erf()?;
    (value * gate)?.to_dtype(y.dtype())
}

/// `weight` is `[O, K, K, C]`.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: ConvShape,
    epilogue: Epilogue,
) -> Result<Tensor> {
    let dtype = product_dtype(x);
    let p = shape.padding;
    let input = x.to_dtype(dtype)?.permute((0, 3, 1, 2))?; // [B, C, H, W]
    let input = input.pad_with_zeros(2, p.top, p.bottom)?.pad_with_zeros(3, p.left, p.right)?.contiguous()?;
    let kernel = weight.to_dtype(dtype)?.permute((0, 3, 1, 2))?.contiguous()?; // [O, C, K, K]
    let y = input.conv2d(&kernel, 0, shape.stride, 1, 1)?;
    let y = y.permute((0, 2, 3, 1))?.contiguous()?; // [B, H', W', O]
    finish(y, bias, epilogue, x.dtype())
}

pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    let batch = x.dim(0)?;
    let positions = x.elem_count() / (batch * channels).max(1);
    let grouped = x.to_dtype(DType::F32)?.reshape((batch, positions, groups, channels / groups))?;
    let count = (positions * (channels / groups)) as f64;
    let mean = (grouped.sum_keepdim((1, 3))? / count)?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = (centred.sqr()?.sum_keepdim((1, 3))? / count)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape(x.shape())?;
    normal.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())
}

/// Statistics of each sample.
pub fn running_stats(x: &Tensor) -> Result<Vec<RunningStats>> {
    let wide = x.to_dtype(DType::F32)?.reshape((x.dim(0)?, (), x.dim(D::Minus1)?))?; // [B, positions, C]
    let count = wide.dim(1)? as f64;
    let mean = wide.mean_keepdim(1)?;
    let spread = wide.broadcast_sub(&mean)?.sqr()?.sum(1)?.to_dtype(DType::F64)?.to_vec2()?;
    let mean = mean.squeeze(1)?.to_dtype(DType::F64)?.to_vec2()?;
    Ok(mean.into_iter().zip(spread).map(|(mean, spread)| RunningStats { count, mean, spread }).collect())
}

/// [`group_norm`] with given statistics.
pub fn group_norm_by(
    x: &Tensor,
    running_stats: &[RunningStats],
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    let (batch, channels) = (x.dim(0)?, x.dim(D::Minus1)?);
    let of_groups: Vec<GroupStats> =
        running_stats.iter().flat_map(|running_stats| running_stats.groups(groups, eps)).collect();
    let column = |number: fn(&GroupStats) -> f64| {
        let numbers: Vec<f32> = of_groups.iter().map(|group| number(group) as f32).collect();
        Tensor::from_vec(numbers, (batch, 1, groups, 1), x.device())
    };
    let grouped = x.to_dtype(DType::F32)?.reshape((batch, (), groups, channels / groups))?;
    let normal = grouped.broadcast_sub(&column(|g| g.mean)?)?.broadcast_mul(&column(|g| g.normal)?)?;
    normal.reshape(x.shape())?.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())
}

pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normal.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())
}

pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let dtype = product_dtype(q);
    let (batch, queries, channels) = q.dims3()?;
    let keys = k.dim(1)?;
    let depth = channels / heads;
    let split = |t: &Tensor, length: usize| -> Result<Tensor> {
        t.to_dtype(dtype)?.reshape((batch, length, heads, depth))?.transpose(1, 2)?.contiguous() // [B, heads, L, D]
    };
    let (q_heads, k_heads, v_heads) = (split(q, queries)?, split(k, keys)?, split(v, keys)?);
    let k_transposed = k_heads.transpose(2, 3)?.contiguous()?;
    let scale = 1.0 / (depth as f64).sqrt();
    let block = (SCORE_BLOCK / (batch * heads * keys).max(1)).clamp(1, queries.max(1));
    let mut blocks = Vec::new();
    for start in (0..queries).step_by(block) {
        let rows = block.min(queries - start);
        let scores =
            (q_heads.narrow(2, start, rows)?.contiguous()?.matmul(&k_transposed)?.to_dtype(DType::F32)? * scale)?;
        let scores = match mask {
            Mask::None => scores,
            Mask::Causal => {
                let hidden: Vec<f32> = (start..start + rows)
                    .flat_map(|i| (0..keys).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY }))
                    .collect();
                scores.broadcast_add(&Tensor::from_vec(hidden, (rows, keys), q.device())?)?
            }
        };
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(dtype)?;
        blocks.push(weights.matmul(&v_heads)?); // [B, heads, rows, D]
    }
    let joined = Tensor::cat(&blocks, 2)?.transpose(1, 2)?.reshape((batch, queries, channels))?;
    joined.to_dtype(q.dtype())
}

pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, rows, columns, _) = x.dims4()?;
    let pick = |to: usize, from: usize| -> Result<Tensor> {
        // torch: floor(i · from / to)
        let index: Vec<u32> = (0..to).map(|i| u32::try_from(i * from / to).unwrap_or(u32::MAX)).collect();
        Tensor::from_vec(index, to, x.device())
    };
    x.contiguous()?.index_select(&pick(height, rows)?, 1)?.index_select(&pick(width, columns)?, 2)
}
