//! Operations without weights: each picks its implementation by device and dtype.

use candle_core::{Result, Tensor};

use crate::kernels::epilogue::Activation;
use crate::kernels::mask::Mask;
use crate::kernels::{cpu, reference, shapes};

impl Activation {
    /// Elementwise, in f32, cast back to the input's dtype.
    ///
    /// # Errors
    /// Device errors.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        if cpu::supports(x) { cpu::activation(self, x) } else { reference::activation(self, x) }
    }
}

/// `softmax(q kᵀ / √D) v` per head, f32 inside; the whole score matrix is never in memory.
/// `q` is `[B, Lq, heads·D]`, `k` and `v` `[B, Lk, heads·D]`; gives `[B, Lq, heads·D]`.
///
/// # Errors
/// Shapes that do not fit; device errors.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let out = shapes::attention(q, k, v, heads)?;
    if shapes::is_empty(&out) || shapes::is_empty(k.dims()) {
        Tensor::zeros(out, q.dtype(), q.device())
    } else if cpu::supports(q) {
        cpu::attention(q, k, v, heads, mask)
    } else {
        reference::attention(q, k, v, heads, mask)
    }
}

/// Nearest-neighbour upscaling of `[B, H, W, C]` to `[B, height, width, C]`, as torch's `interpolate` picks rows.
///
/// # Errors
/// Device errors.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let out = shapes::upsample(x, height, width)?;
    if shapes::is_empty(&out) {
        Tensor::zeros(out, x.dtype(), x.device())
    } else if cpu::supports(x) {
        cpu::upsample_nearest(x, &out)
    } else {
        reference::upsample_nearest(x, height, width)
    }
}

/// Joins feature maps along their channels.
///
/// # Errors
/// Shapes that do not fit; device errors.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = shapes::concat(a, b)?;
    if shapes::is_empty(&out) {
        Tensor::zeros(out, a.dtype(), a.device())
    } else if cpu::supports(a) {
        cpu::concat_channels(a, b, &out)
    } else {
        Tensor::cat(&[a, b], a.rank() - 1)
    }
}
