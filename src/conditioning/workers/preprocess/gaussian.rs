//! Separable Gaussian blurs as in OpenCV, across and then down with mirrored border: bytes in 8-bit fixed point, floats in
//! f32.

use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Rgb8, mirrored};

/// Weights exp(-x²/2σ²) of an odd number of taps with sum 1. `reach` is the window's half width in σ.
fn taps(sigma: f64, reach: f64) -> Vec<f64> {
    let count = ((sigma * reach * 2.0 + 1.0).round_ties_even() as usize) | 1;
    let half = (count / 2) as f64;
    let weights: Vec<f64> = (0..count).map(|at| (-(at as f64 - half).powi(2) / (2.0 * sigma * sigma)).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// The taps in 256ths. Rounding errors propagate from the ends inwards; the middle tap makes the sum 256.
fn fixed_taps(sigma: f64) -> Vec<u32> {
    let exact = taps(sigma, 3.0);
    let half = exact.len() / 2;
    let (mut fixed, mut error, mut sum) = (vec![0u32; exact.len()], 0.0, 0u32);
    for at in 0..half {
        let wanted = exact[at] * 256.0 + error;
        let got = wanted.round_ties_even();
        error = wanted - got;
        let got = got.max(0.0) as u32;
        fixed[at] = got;
        fixed[exact.len() - 1 - at] = got;
        sum += 2 * got;
    }
    fixed[half] = 256u32.saturating_sub(sum);
    fixed
}

/// Blurs bytes; σ in pixels, above 0.
pub(crate) fn blur_bytes(image: &Rgb8, sigma: f64, ctx: &Context) -> Result<Rgb8> {
    let Rgb8 { width, height, ref data } = *image;
    let taps = fixed_taps(sigma);
    let (half, stride) = ((taps.len() / 2).cast_signed(), 3 * width);
    let mut across = vec![0u16; data.len()];
    let mut padded = vec![0u32; 3 * (width + taps.len())];
    let mut sums = vec![0u32; stride];
    for (row, out) in data.chunks_exact(stride).zip(across.chunks_exact_mut(stride)) {
        ctx.checkpoint()?;
        pad(row, width, half, &mut padded);
        sum(&taps, |tap| &padded[3 * tap..][..stride], &mut sums);
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = sum as u16;
        }
    }
    let mut result = Vec::with_capacity(data.len());
    for y in 0..height {
        ctx.checkpoint()?;
        sums.fill(1 << 15);
        for (tap, &weight) in taps.iter().enumerate() {
            let from = mirrored(y.cast_signed() + tap.cast_signed() - half, height);
            for (sum, &value) in sums.iter_mut().zip(&across[from * stride..][..stride]) {
                *sum += weight * u32::from(value);
            }
        }
        result.extend(sums.iter().map(|sum| (sum >> 16) as u8));
    }
    Ok(Rgb8 { width, height, data: result })
}

/// Blurs interleaved channels in f32; σ in pixels, with a window of 4 σ to either side.
pub(crate) fn blur_floats(image: &Rgb8, sigma: f64, ctx: &Context) -> Result<Vec<f32>> {
    let Rgb8 { width, height, ref data } = *image;
    let taps: Vec<f32> = taps(sigma, 4.0).into_iter().map(|weight| weight as f32).collect();
    let (half, stride) = ((taps.len() / 2).cast_signed(), 3 * width);
    let mut across = vec![0f32; data.len()];
    let mut padded = vec![0f32; 3 * (width + taps.len())];
    for (row, out) in data.chunks_exact(stride).zip(across.chunks_exact_mut(stride)) {
        ctx.checkpoint()?;
        pad(row, width, half, &mut padded);
        sum(&taps, |tap| &padded[3 * tap..][..stride], out);
    }
    let mut result = vec![0f32; data.len()];
    for (y, out) in result.chunks_exact_mut(stride).enumerate() {
        ctx.checkpoint()?;
        let row = |tap: usize| mirrored(y.cast_signed() + tap.cast_signed() - half, height);
        sum(&taps, |tap| &across[row(tap) * stride..][..stride], out);
    }
    Ok(result)
}

/// Writes the row with mirrored pixels at both ends for the taps.
fn pad<T: From<u8>>(row: &[u8], width: usize, half: isize, padded: &mut [T]) {
    for (at, pixel) in padded.chunks_exact_mut(3).enumerate() {
        let from = 3 * mirrored(at.cast_signed() - half, width);
        for (value, &byte) in pixel.iter_mut().zip(&row[from..from + 3]) {
            *value = T::from(byte);
        }
    }
}

fn sum<'a, T>(taps: &[T], row: impl Fn(usize) -> &'a [T], out: &mut [T])
where
    T: Copy + Default + std::ops::Mul<Output = T> + std::ops::AddAssign + 'a,
{
    out.fill(T::default());
    for (tap, &weight) in taps.iter().enumerate() {
        for (out, &value) in out.iter_mut().zip(row(tap)) {
            *out += weight * value;
        }
    }
}
