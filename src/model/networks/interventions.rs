//! Interventions in one evaluation of the UNet: perturbed samples for guidance, and FreeU. Nothing persists.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `R` rows of a basis.

use std::f64::consts::TAU;
use std::ops::Range;

use candle_core::{DType, Result as CandleResult, Tensor};

/// Interventions in one evaluation; none by default.
#[derive(Clone, Copy, Default)]
pub struct Steering<'a> {
    /// Disjoint ranges of samples, in order.
    pub perturbed: &'a [Perturbed],
    pub freeu: Option<&'a FreeU>,
}

/// Samples for which some transformer blocks are changed.
#[derive(Clone, Debug)]
pub struct Perturbed {
    pub samples: Range<usize>,
    /// The change of each transformer block, in the order of evaluation; `None` for an unchanged block.
    pub blocks: Vec<Option<Change>>,
}

/// A change of a transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The block returns its input.
    Skipped,
    Within {
        attention: SelfAttention,
        /// The feed-forward layer returns its normed input.
        skips_feed_forward: bool,
    },
}

/// Behaviour of self-attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelfAttention {
    Kept,
    /// Every position attends to itself alone: Ahn et al. 2024, <https://arxiv.org/abs/2403.17377>, section 4.
    Identity,
    /// It returns its normed input.
    Skipped,
}

/// FreeU (Si et al. 2023, <https://arxiv.org/abs/2309.11497>): factors of the first up blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct FreeU {
    pub stages: [FreeUFactors; 2],
}

/// Factors of one up block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FreeUFactors {
    /// Factor of the first half of the backbone's channels.
    pub backbone: f64,
    /// Factor of the skip connection's lowest frequencies.
    pub skip: f64,
}

impl FreeUFactors {
    /// Backbone and skip connection, both `[B, H, W, C]`, as they are joined.
    pub(crate) fn apply(self, backbone: &Tensor, skip: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        let channels = backbone.dims4()?.3;
        let factors: Vec<f32> =
            (0..channels).map(|c| if c < channels / 2 { self.backbone as f32 } else { 1.0 }).collect();
        let factors = Tensor::from_vec(factors, channels, backbone.device())?.to_dtype(backbone.dtype())?;
        Ok((backbone.broadcast_mul(&factors)?, scale_low(skip, self.skip)?))
    }
}

/// Scales the frequencies 0 and -1 of both axes, a square of 2 × 2 in the shifted spectrum, and keeps the real part of
/// the result: `x + (s − 1) · Re Σ X(k) e(k) / (H W)`. With real `x` each frequency gives its cosine and its sine,
/// so the sum is `Mᵀ M x / (H W)`, M having a row for each of them.
fn scale_low(x: &Tensor, factor: f64) -> CandleResult<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let axis = |length: usize| if length > 1 { &[0.0, -1.0][..] } else { &[0.0][..] };
    let mut rows = Vec::new();
    for &down in axis(height) {
        for &across in axis(width) {
            let angles = (0..height * width).map(|at| {
                let (row, column) = ((at / width) as f64, (at % width) as f64);
                TAU * (down * row / height as f64 + across * column / width as f64)
            });
            rows.extend(angles.clone().map(|angle| angle.cos() as f32));
            rows.extend(angles.map(|angle| angle.sin() as f32));
        }
    }
    let count = height * width;
    let basis = Tensor::from_vec(rows, ((), count), x.device())?; // [R, HW]
    let wide = x.to_dtype(DType::F32)?.reshape((batch, count, channels))?;
    let spread = |matrix: &Tensor| -> CandleResult<Tensor> {
        let (rows, columns) = matrix.dims2()?;
        matrix.unsqueeze(0)?.expand((batch, rows, columns))?.contiguous()
    };
    let spectrum = spread(&basis)?.matmul(&wide.contiguous()?)?; // [B, R, C]
    let low = spread(&basis.t()?.contiguous()?)?.matmul(&spectrum)?; // [B, HW, C]
    let scaled = (wide + (low * ((factor - 1.0) / count as f64))?)?;
    scaled.reshape(x.shape())?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// A wave of `down` by `across` periods, and how much of it is left.
    fn check(sides: (usize, usize), (down, across): (f64, f64), expected: f64) {
        let (height, width) = sides;
        let wave: Vec<f32> = (0..height * width)
            .map(|at| {
                let (row, column) = ((at / width) as f64 / height as f64, (at % width) as f64 / width as f64);
                (TAU * (down * row + across * column)).cos() as f32
            })
            .collect();
        let x = Tensor::from_vec(wave, (1, height, width, 1), &Device::Cpu).unwrap();
        let y = scale_low(&x, 0.5).unwrap();
        let error =
            ((x * expected).unwrap() - y).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{sides:?} {down} {across}: {error}");
    }

    #[test]
    fn freeu_scales_a_square_of_two_by_two_frequencies() {
        check((6, 8), (0.0, 0.0), 0.5);
        // Of a wave's two frequencies, k and -k, one lies in the square.
        check((6, 8), (1.0, 0.0), 0.75);
        check((5, 7), (1.0, 1.0), 0.75);
        check((6, 8), (1.0, -1.0), 1.0);
        check((6, 8), (2.0, 0.0), 1.0);
        check((1, 4), (0.0, 0.0), 0.5);
        // Of length 2, both are the same frequency.
        check((2, 2), (1.0, 0.0), 0.5);
    }
}
