//! Group and layer norm. Statistics are sums of a few rows in f32, of those in f64: as exact as f64 throughout.

use candle_core::Result;
use rayon::prelude::{IntoParallelIterator, ParallelIterator};

use crate::kernels::cpu::element::{Element, Held};
use crate::kernels::cpu::parallel::{make_rows, rows_per_block};
use crate::kernels::cpu::simd;
use crate::kernels::running_stats::{OfGroup, RunningStats};

/// Mean, scale and shift of every channel of one sample.
struct Channels {
    mean: Vec<f32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
}

pub(crate) struct Affine<'a> {
    /// `[C]`
    pub(crate) weight: &'a [f32],
    /// `[C]`
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f64,
}

impl Channels {
    fn new(running_stats: &RunningStats, groups: usize, affine: &Affine) -> Self {
        let channels = affine.weight.len();
        let of_group = channels / groups;
        let (mut mean, mut scale, mut shift) = (vec![0.0; channels], vec![0.0; channels], vec![0.0; channels]);
        for (group, OfGroup { mean: middle, normal }) in
            running_stats.groups(groups, affine.eps).into_iter().enumerate()
        {
            for c in group * of_group..(group + 1) * of_group {
                mean[c] = middle as f32;
                scale[c] = (f64::from(affine.weight[c]) * normal) as f32;
                // What the mean lost on its way to f32 comes back here.
                let lost = (middle - f64::from(mean[c])) * f64::from(scale[c]);
                shift[c] = (f64::from(affine.bias[c]) - lost) as f32;
            }
        }
        Self { mean, scale, shift }
    }
}

/// One tally a sample of `x`, which is `[batch, positions, C]`.
pub(crate) fn running_stats<T: Element>(x: &Held, batch: usize, channels: usize) -> Result<Vec<RunningStats>> {
    let x = x.slice::<T>()?;
    let positions = x.len() / (batch * channels).max(1);
    Ok(x.chunks_exact((positions * channels).max(1)).map(|sample| sample_stats(sample, channels)).collect())
}

/// `x` is `[batch, positions, C]`; it need not be the positions that `running_stats` are of.
pub(crate) fn group_norm<T: Element>(
    x: &Held,
    running_stats: &[RunningStats],
    groups: usize,
    affine: &Affine,
    silu: bool,
) -> Result<Vec<T>> {
    let x = x.slice::<T>()?;
    let (batch, channels) = (running_stats.len(), affine.weight.len());
    let positions = x.len() / (batch * channels).max(1);
    let samples: Vec<Channels> =
        running_stats.iter().map(|running_stats| Channels::new(running_stats, groups, affine)).collect();
    Ok(make_rows(batch * positions, channels, |first, out| {
        let mut row = first;
        let mut out = out;
        // A run of rows may cross from one sample into the next.
        while !out.is_empty() {
            let of_sample = (positions - row % positions).min(out.len() / channels);
            let (now, later) = out.split_at_mut(of_sample * channels);
            let Channels { mean, scale, shift } = &samples[row / positions];
            let from = &x[row * channels..(row + of_sample) * channels];
            if silu {
                simd::normalise_silu(from, mean, scale, shift, now);
            } else {
                simd::normalise(from, mean, scale, shift, now);
            }
            row += of_sample;
            out = later;
        }
    }))
}

/// `sample` is `[positions, C]`.
fn sample_stats<T: Element>(sample: &[T], channels: usize) -> RunningStats {
    // Sums run over the distance to the first position, so that a large mean costs no digits.
    let mut pivot = vec![0.0; channels];
    simd::widen_slice(&sample[..channels], &mut pivot);
    let size = rows_per_block(channels) * channels;
    let partial = |block: usize| {
        let (mut sums, mut squares) = (vec![0.0; channels], vec![0.0; channels]);
        let mut buffer = vec![0.0; 2 * channels];
        let rows = &sample[block * size..((block + 1) * size).min(sample.len())];
        simd::channel_sums(rows, &pivot, &mut sums, &mut squares, &mut buffer);
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

/// `x` is `[.., C]`.
pub(crate) fn layer_norm<T: Element>(x: &Held, affine: &Affine) -> Result<Vec<T>> {
    let x = x.slice::<T>()?;
    let channels = affine.weight.len();
    Ok(make_rows(x.len() / channels.max(1), channels, |first, out| {
        let from = &x[first * channels..];
        for (to, from) in out.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            simd::layer_norm_row(from, affine.weight, affine.bias, affine.eps, to);
        }
    }))
}
