//! Resizes byte images bit for bit like Pillow's `Image.resize`, which the reference uses: a separable filter, across and
//! then down, with 22-bit coefficients and bytes between the two. Pillow 13 goes down first for some pairs of sizes, and
//! then differs by a level or two.

use crate::error::{Error, Result};

/// The resampling filter. It widens when an image shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    /// Keys' cubic with a = -0.5.
    Bicubic,
    /// Three lobes.
    Lanczos,
}

impl Filter {
    /// Half width in source pixels, without scaling.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        let sinc = |x: f64| match x == 0.0 {
            true => 1.0,
            false => (std::f64::consts::PI * x).sin() / (std::f64::consts::PI * x),
        };
        match self {
            _ if x >= self.support() => 0.0,
            Self::Bilinear => 1.0 - x,
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Lanczos => sinc(x) * sinc(x / 3.0),
        }
    }
}

/// Fractional bits of a coefficient.
const PRECISION: u32 = 32 - 8 - 2;

/// Most bytes of an intermediate image.
const MAX_BYTES: usize = 1 << 30;

/// The source pixels of one output pixel, from `first` on, and their coefficients.
struct FilterWindow {
    first: usize,
    weights: Vec<i64>,
}

/// Resizes an image of `channels` interleaved bytes from size `from` to size `to`, both width and height.
///
/// # Errors
/// `image_too_large` if the intermediate image of a narrow one would be huge; `internal` for an empty size, or data of
/// another length than the size says.
pub fn resize(
    data: &[u8],
    channels: usize,
    from: (usize, usize),
    to: (usize, usize),
    filter: Filter,
) -> Result<Vec<u8>> {
    if channels == 0 || from.0 * from.1 == 0 || to.0 * to.1 == 0 || data.len() != from.0 * from.1 * channels {
        return Err(Error::bug(format!("{} bytes to resize from {from:?} to {to:?}, {channels} channels", data.len())));
    }
    let bytes = |width: usize, height: usize| width.checked_mul(height).and_then(|pixels| pixels.checked_mul(channels));
    if [bytes(to.0, from.1), bytes(to.0, to.1)].iter().any(|bytes| bytes.is_none_or(|bytes| bytes > MAX_BYTES)) {
        let (from, to) = (format!("{} × {}", from.0, from.1), format!("{} × {}", to.0, to.1));
        return Err(Error::ImageTooLarge { message: format!("its proportions differ too much: {from} to {to}") });
    }
    let across = match from.0 == to.0 {
        true => data.to_vec(),
        false => {
            let windows = windows(from.0, to.0, filter);
            let mut rows = Vec::with_capacity(to.0 * from.1 * channels);
            for row in data.chunks_exact(from.0 * channels) {
                for window in &windows {
                    for channel in 0..channels {
                        let source = row.iter().skip(window.first * channels + channel).step_by(channels);
                        rows.push(window.apply(source));
                    }
                }
            }
            rows
        }
    };
    if from.1 == to.1 {
        return Ok(across);
    }
    let stride = to.0 * channels;
    let mut down = Vec::with_capacity(stride * to.1);
    for window in windows(from.1, to.1, filter) {
        for column in 0..stride {
            down.push(window.apply(across.iter().skip(window.first * stride + column).step_by(stride)));
        }
    }
    Ok(down)
}

impl FilterWindow {
    fn apply<'a>(&self, source: impl Iterator<Item = &'a u8>) -> u8 {
        let half = 1i64 << (PRECISION - 1);
        let sum = self.weights.iter().zip(source).fold(half, |sum, (weight, &byte)| sum + weight * i64::from(byte));
        (sum >> PRECISION).clamp(0, 255) as u8
    }
}

fn windows(from: usize, to: usize, filter: Filter) -> Vec<FilterWindow> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    (0..to)
        .map(|position| {
            let centre = (position as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let weight = |at: usize| filter.weight((at as f64 - centre + 0.5) / stretch);
            let weights: Vec<f64> = (first..end).map(weight).collect();
            let total: f64 = weights.iter().sum();
            let whole = f64::from(1u32 << PRECISION);
            let fixed = |weight: f64| (weight / total * whole).round() as i64;
            FilterWindow { first, weights: weights.into_iter().map(fixed).collect() }
        })
        .collect()
}
