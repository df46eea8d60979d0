//! Group and layer norm. Statistics are sums of a few rows in f32, and of those sums in f64, as exact as f64 throughout.
#![expect(unsafe_code, reason = "results are written to uninitialized memory")]

use std::mem::MaybeUninit;

use candle_core::Result;
use rayon::prelude::{IntoParallelIterator, ParallelIterator};

use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::elementwise::widen_slice;
use crate::kernels::cpu::math::silu;
use crate::kernels::cpu::parallel::{make_rows, rows_per_block};
use crate::kernels::cpu::simd::multiversion;
use crate::kernels::cpu::tensor_guard::TensorGuard;
use crate::kernels::running_stats::{GroupStats, RunningStats};

/// Numbers of a block, which the compiler keeps in registers.
const LANES: usize = 16;

/// Mean, scale and shift of every channel of one sample.
struct ChannelNorm {
    mean: Vec<f32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
}

/// The parameters of a norm.
pub(crate) struct Affine<'a> {
    /// `[C]`
    pub(crate) weight: &'a [f32],
    /// `[C]`
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f64,
}

impl ChannelNorm {
    fn new(running_stats: &RunningStats, groups: usize, affine: &Affine) -> Self {
        let channels = affine.weight.len();
        let of_group = channels / groups;
        let (mut mean, mut scale, mut shift) = (vec![0.0; channels], vec![0.0; channels], vec![0.0; channels]);
        for (group, GroupStats { mean: middle, normal }) in
            running_stats.groups(groups, affine.eps).into_iter().enumerate()
        {
            for c in group * of_group..(group + 1) * of_group {
                mean[c] = middle as f32;
                scale[c] = (f64::from(affine.weight[c]) * normal) as f32;
                // The shift adds what the mean lost when it was rounded to f32.
                let lost = (middle - f64::from(mean[c])) * f64::from(scale[c]);
                shift[c] = (f64::from(affine.bias[c]) - lost) as f32;
            }
        }
        Self { mean, scale, shift }
    }
}

/// The statistics of each sample of `x`, which is `[batch, positions, C]`.
pub(crate) fn running_stats<T: Element>(x: &TensorGuard, batch: usize, channels: usize) -> Result<Vec<RunningStats>> {
    let x = x.slice::<T>()?;
    let positions = x.len() / (batch * channels).max(1);
    Ok(x.chunks_exact((positions * channels).max(1)).map(|sample| sample_stats(sample, channels)).collect())
}

/// Group norm of `x`, `[batch, positions, C]`, by `running_stats`, which may cover more positions than `x` has.
pub(crate) fn group_norm<T: Element>(
    x: &TensorGuard,
    running_stats: &[RunningStats],
    groups: usize,
    affine: &Affine,
    silu: bool,
) -> Result<Vec<T>> {
    let x = x.slice::<T>()?;
    let (batch, channels) = (running_stats.len(), affine.weight.len());
    let positions = x.len() / (batch * channels).max(1);
    let samples: Vec<ChannelNorm> =
        running_stats.iter().map(|running_stats| ChannelNorm::new(running_stats, groups, affine)).collect();
    let fill = |first: usize, out: &mut [MaybeUninit<T>]| {
        let mut row = first;
        let mut out = out;
        // A run of rows may cross from one sample into the next.
        while !out.is_empty() {
            let of_sample = (positions - row % positions).min(out.len() / channels);
            let (now, later) = out.split_at_mut(of_sample * channels);
            let ChannelNorm { mean, scale, shift } = &samples[row / positions];
            let from = &x[row * channels..(row + of_sample) * channels];
            if silu {
                normalize_silu(from, mean, scale, shift, now);
            } else {
                normalize(from, mean, scale, shift, now);
            }
            row += of_sample;
            out = later;
        }
    };
    // SAFETY: `fill` writes the rows of one sample after the other until none is left.
    Ok(unsafe { make_rows(batch * positions, channels, fill) })
}

/// `sample` is `[positions, C]`.
fn sample_stats<T: Element>(sample: &[T], channels: usize) -> RunningStats {
    // Sums are of the distance to the first position, so that a large mean costs no digits.
    let mut pivot = vec![0.0; channels];
    widen_slice(&sample[..channels], &mut pivot);
    let size = rows_per_block(channels) * channels;
    let partial = |block: usize| {
        let (mut sums, mut squares) = (vec![0.0; channels], vec![0.0; channels]);
        let mut buffer = vec![0.0; 2 * channels];
        let rows = &sample[block * size..((block + 1) * size).min(sample.len())];
        channel_sums(rows, &pivot, &mut sums, &mut squares, &mut buffer);
        (sums, squares)
    };
    let blocks = sample.len().div_ceil(size);
    let partials: Vec<(Vec<f64>, Vec<f64>)> =
        if blocks < 2 { vec![partial(0)] } else { (0..blocks).into_par_iter().map(partial).collect() };
    let (mut mean, mut spread) = (vec![0.0; channels], vec![0.0; channels]);
    for (part, part_squares) in &partials {
        for c in 0..channels {
            mean[c] += part[c];
            spread[c] += part_squares[c];
        }
    }
    let count = (sample.len() / channels) as f64;
    for (c, (mean, spread)) in mean.iter_mut().zip(&mut spread).enumerate() {
        let own = *mean / count;
        *spread -= own * own * count;
        *mean = f64::from(pivot[c]) + own;
    }
    RunningStats { count, mean, spread }
}

/// Layer norm of `x`, `[.., C]`.
pub(crate) fn layer_norm<T: Element>(x: &TensorGuard, affine: &Affine) -> Result<Vec<T>> {
    let x = x.slice::<T>()?;
    let channels = affine.weight.len();
    let fill = |first: usize, out: &mut [MaybeUninit<T>]| {
        let from = &x[first * channels..];
        for (to, from) in out.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            layer_norm_row(from, affine.weight, affine.bias, affine.eps, to);
        }
    };
    // SAFETY: `out` is whole rows, and `fill` writes each of them.
    Ok(unsafe { make_rows(x.len() / channels.max(1), channels, fill) })
}

/// Writes the rounded `activate((x - mean) · scale + shift)` of one row.
#[inline(always)]
fn normalize_row<T: Element>(
    from: &[T],
    [mean, scale, shift]: [&[f32]; 3],
    to: &mut [MaybeUninit<T>],
    activate: impl Fn(f32) -> f32,
) {
    let ((means, mean), (scales, scale)) = (mean.as_chunks::<LANES>(), scale.as_chunks::<LANES>());
    let ((shifts, shift), (blocks, rest)) = (shift.as_chunks::<LANES>(), from.as_chunks::<LANES>());
    let (to_blocks, to_rest) = to.as_chunks_mut::<LANES>();
    let per_channel = means.iter().zip(scales).zip(shifts);
    for ((to, from), ((mean, scale), shift)) in to_blocks.iter_mut().zip(blocks).zip(per_channel) {
        let mut line = [0.0; LANES];
        for i in 0..LANES {
            line[i] = activate((from[i].widen() - mean[i]) * scale[i] + shift[i]);
        }
        T::round_block(&line, to);
    }
    for ((to, from), ((mean, scale), shift)) in to_rest.iter_mut().zip(rest).zip(mean.iter().zip(scale).zip(shift)) {
        to.write(T::round(activate((from.widen() - mean) * scale + shift)));
    }
}

multiversion! {
    /// Adds the sums of `x - pivot` and of its square per channel to `sums` and `squares`. `rows` is `[rows, C]`.
    fn channel_sums<T>(rows: &[T], pivot: &[f32], sums: &mut [f64], squares: &mut [f64], buffer: &mut [f32]) {
        let channels = pivot.len().max(1);
        let (first, second) = buffer.split_at_mut(channels);
        // f32 sums a few rows without a loss that matters; f64 sums the rest.
        for block in rows.chunks(16 * channels) {
            first.fill(0.0);
            second.fill(0.0);
            for row in block.chunks_exact(channels) {
                for (((first, second), pivot), x) in first.iter_mut().zip(&mut *second).zip(pivot).zip(row) {
                    let d = x.widen() - pivot;
                    *first += d;
                    *second += d * d;
                }
            }
            for ((sum, square), (first, second)) in
                sums.iter_mut().zip(&mut *squares).zip(first.iter().zip(second.iter()))
            {
                *sum += f64::from(*first);
                *square += f64::from(*second);
            }
        }
    }

    /// Writes `(x - mean) · scale + shift` per channel. `from` and `to` are `[rows, C]`.
    fn normalize<T>(from: &[T], mean: &[f32], scale: &[f32], shift: &[f32], to: &mut [MaybeUninit<T>]) {
        let channels = mean.len().max(1);
        for (to, from) in to.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            normalize_row(from, [mean, scale, shift], to, |x| x);
        }
    }

    /// Writes SiLU of what [`normalize`] gives.
    fn normalize_silu<T>(from: &[T], mean: &[f32], scale: &[f32], shift: &[f32], to: &mut [MaybeUninit<T>]) {
        let channels = mean.len().max(1);
        for (to, from) in to.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            normalize_row(from, [mean, scale, shift], to, silu);
        }
    }

    /// Layer norm of one row.
    fn layer_norm_row<T>(from: &[T], weight: &[f32], bias: &[f32], eps: f64, to: &mut [MaybeUninit<T>]) {
        let count = from.len().max(1) as f64;
        let (blocks, rest) = from.as_chunks::<LANES>();
        let mut lanes = [0.0_f32; LANES];
        for block in blocks {
            for (lane, x) in lanes.iter_mut().zip(block) {
                *lane += x.widen();
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += x.widen();
        }
        let mean = (lanes.into_iter().map(f64::from).sum::<f64>() / count) as f32;
        let (mut lanes, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        for block in blocks {
            for ((lane, square), x) in lanes.iter_mut().zip(&mut squares).zip(block) {
                let d = x.widen() - mean;
                *lane += d;
                *square += d * d;
            }
        }
        for ((lane, square), x) in lanes.iter_mut().zip(&mut squares).zip(rest) {
            let d = x.widen() - mean;
            *lane += d;
            *square += d * d;
        }
        // The first mean is as exact as f32 sums are; the mean of the distances to it corrects it.
        let correction = lanes.into_iter().map(f64::from).sum::<f64>() / count;
        let variance = squares.into_iter().map(f64::from).sum::<f64>() / count - correction * correction;
        let scale = (1.0 / (variance.max(0.0) + eps).sqrt()) as f32;
        let correction = correction as f32;
        let affine = weight.iter().zip(bias);
        if T::IS_F32 {
            for ((to, from), (weight, bias)) in to.iter_mut().zip(from).zip(affine) {
                to.write(T::round((from.widen() - mean - correction) * scale * weight + bias));
            }
            return;
        }
        let (to_blocks, to_rest) = to.as_chunks_mut::<LANES>();
        let ((weights, weight), (biases, bias)) = (weight.as_chunks::<LANES>(), bias.as_chunks::<LANES>());
        for ((to, from), (weight, bias)) in to_blocks.iter_mut().zip(blocks).zip(weights.iter().zip(biases)) {
            let mut line = [0.0; LANES];
            for i in 0..LANES {
                line[i] = (from[i].widen() - mean - correction) * scale * weight[i] + bias[i];
            }
            T::round_block(&line, to);
        }
        for ((to, from), (weight, bias)) in to_rest.iter_mut().zip(rest).zip(weight.iter().zip(bias)) {
            to.write(T::round((from.widen() - mean - correction) * scale * weight + bias));
        }
    }
}
