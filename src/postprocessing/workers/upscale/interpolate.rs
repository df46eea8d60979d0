//! Separable interpolation of latents, equal to torch's `interpolate` with `align_corners=False`.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::postprocessing::upscaler::UpscaleTask;

/// The source positions of one output position, from `first` on, and their weights.
pub(super) struct Taps<const N: usize> {
    pub(super) first: isize,
    pub(super) weights: [f64; N],
}

/// Resizes each channel; `taps` maps an output position and the scale (source over output size) to source positions.
pub(super) fn interpolate<const N: usize>(
    task: &UpscaleTask<'_, Tensor>,
    taps: impl Fn(usize, f64) -> Taps<N>,
) -> Result<Tensor> {
    let UpscaleTask { image, width, height } = *task;
    let (batch, from_height, from_width, channels) = image.dims4()?;
    let matrix = |from: usize, to: usize| -> Result<Tensor> {
        Ok(Tensor::from_vec(weights(from, to, &taps), (to, from), image.device())?.to_dtype(DType::F32)?)
    };
    let rows = matrix(from_height, height)?; // [H', H]
    let columns = matrix(from_width, width)?; // [W', W]
    let x = image.permute((0, 3, 1, 2))?.contiguous()?.reshape((batch * channels, from_height, from_width))?;
    let x = rows.broadcast_matmul(&x)?.broadcast_matmul(&columns.t()?.contiguous()?)?;
    Ok(x.reshape((batch, channels, height, width))?.permute((0, 2, 3, 1))?.contiguous()?)
}

/// Row-major `[to, from]`; positions outside the source take its edge.
fn weights<const N: usize>(from: usize, to: usize, taps: impl Fn(usize, f64) -> Taps<N>) -> Vec<f32> {
    let mut matrix = vec![0f32; from * to];
    let last = from.saturating_sub(1) as isize;
    let scale = from as f64 / to as f64;
    for (position, row) in matrix.chunks_exact_mut(from).enumerate() {
        let Taps { first, weights } = taps(position, scale);
        for (offset, weight) in weights.into_iter().enumerate() {
            row[(first + offset as isize).clamp(0, last) as usize] += weight as f32;
        }
    }
    matrix
}
