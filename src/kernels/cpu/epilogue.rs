//! The epilogue of a product: bias, time embedding, activation, residual or GEGLU, applied to a tile of sums while it is in
//! the cache, and the rounding to the dtype of the activations.

use candle_core::Result;

use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::math::{gelu, quick_gelu, silu};
use crate::kernels::cpu::micro::tile::PANEL;
use crate::kernels::cpu::parallel::OutputTiles;
use crate::kernels::cpu::prefetch::prefetch;
use crate::kernels::cpu::quantize::QuantizedActivations;
use crate::kernels::cpu::simd::multiversion;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd::rounds_bf16;
use crate::kernels::cpu::tensor_guard::TensorGuard;
use crate::kernels::epilogue::Activation;

/// The tensors of an epilogue, locked for reading.
pub(crate) struct EpilogueTensors<'a> {
    pub(crate) bias: Option<TensorGuard<'a>>,
    pub(crate) per_sample: Option<TensorGuard<'a>>,
    pub(crate) activation: Option<Activation>,
    /// In the dtype of the activations.
    pub(crate) residual: Option<TensorGuard<'a>>,
    /// Rows of one sample.
    pub(crate) rows_per_sample: usize,
    /// Multiplies the first half of the outputs by GELU of the second. Half the outputs are a multiple of 32.
    pub(crate) gated: bool,
}

/// The epilogue of a whole result.
pub(crate) struct FusedEpilogue<'a, T> {
    /// `[O]`
    pub(crate) bias: Option<&'a [f32]>,
    /// `[B, O]`
    pub(crate) per_sample: Option<&'a [f32]>,
    pub(crate) activation: Option<Activation>,
    /// `[rows, O]`
    pub(crate) residual: Option<&'a [T]>,
    pub(crate) rows_per_sample: usize,
    /// `O`
    pub(crate) outputs: usize,
}

/// The position of a tile in the result.
#[derive(Clone, Copy)]
pub(crate) struct TileRegion {
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) column: usize,
    /// At most 32.
    pub(crate) columns: usize,
}

impl<'a, T: Element> FusedEpilogue<'a, T> {
    /// The epilogue of a result with `outputs` columns.
    pub(crate) fn new(tensors: &'a EpilogueTensors, outputs: usize) -> Result<Self> {
        Ok(Self {
            bias: tensors.bias.as_ref().map(TensorGuard::slice).transpose()?,
            per_sample: tensors.per_sample.as_ref().map(TensorGuard::slice).transpose()?,
            activation: tensors.activation,
            residual: tensors.residual.as_ref().map(TensorGuard::slice).transpose()?,
            rows_per_sample: tensors.rows_per_sample.max(1),
            outputs,
        })
    }

    /// Prefetches the lines that `region` reads and writes.
    pub(crate) fn prefetch(&self, region: TileRegion, to: OutputTiles<T>) {
        let bytes = region.columns * size_of::<T>();
        for row in region.row..region.row + region.rows {
            let at = row * self.outputs + region.column;
            if let Some(residual) = self.residual {
                prefetch(residual.as_ptr().wrapping_add(at).cast(), bytes);
            }
            prefetch(to.address(at), bytes);
        }
    }
}

/// Columns of a tile that are processed at once. They are passed by value, so that they stay in a register.
const LANES: usize = 16;
type Lanes = [f32; LANES];

#[inline(always)]
fn add<T: Element>(lanes: Lanes, from: &[T; LANES]) -> Lanes {
    let mut sums = [0.0; LANES];
    for i in 0..LANES {
        sums[i] = lanes[i] + from[i].widen();
    }
    sums
}

#[inline(always)]
fn map_lanes(lanes: Lanes, value: impl Fn(f32) -> f32) -> Lanes {
    let mut values = [0.0; LANES];
    for i in 0..LANES {
        values[i] = value(lanes[i]);
    }
    values
}

/// `value · gelu(gate)`, as exact as the dtype of the results can represent.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "a function compiled for more than the baseline"))]
#[inline(always)]
fn gate<T: Element>(value: Lanes, gate: Lanes) -> Lanes {
    #[cfg(target_arch = "x86_64")]
    if !T::IS_F32 && rounds_bf16() {
        // SAFETY: a processor that rounds to bf16 has AVX-512 F.
        return unsafe { avx512::gate(value, gate) };
    }
    let mut gated = [0.0; LANES];
    for i in 0..LANES {
        gated[i] = value[i] * gelu(gate[i]);
    }
    gated
}

/// 16 columns of `from` from `first` on, if it has as many.
#[inline(always)]
fn block<T>(from: Option<&[T]>, first: usize) -> Option<&[T; LANES]> {
    from.and_then(|from| from.get(first..)?.first_chunk())
}

/// Writes a tile of 32 columns, 16 at a time.
#[inline(always)]
fn write_full_tile<T: Element>(
    epilogue: &FusedEpilogue<T>,
    tile: &[[f32; PANEL]],
    region: TileRegion,
    to: OutputTiles<T>,
    activate: impl Fn(f32) -> f32,
) {
    let biases = [block(epilogue.bias, region.column), block(epilogue.bias, region.column + LANES)];
    for (row, line) in (region.row..region.row + region.rows).zip(tile) {
        for (at, bias) in [0, LANES].into_iter().zip(biases) {
            let column = region.column + at;
            let Some(mut lanes) = line[at..].first_chunk::<LANES>().copied() else { return };
            if let Some(bias) = bias {
                lanes = add(lanes, bias);
            }
            if epilogue.per_sample.is_some()
                && let Some(shift) =
                    block(epilogue.per_sample, row / epilogue.rows_per_sample * epilogue.outputs + column)
            {
                lanes = add(lanes, shift);
            }
            lanes = map_lanes(lanes, &activate);
            let start = row * epilogue.outputs + column;
            if let Some(residual) = block(epilogue.residual, start) {
                lanes = add(lanes, residual);
            }
            if let Some(to) = to.line(start, LANES).first_chunk_mut() {
                T::round_block(&lanes, to);
            }
        }
    }
}

/// Writes a tile of fewer columns.
#[inline(always)]
fn write_partial_tile<T: Element>(
    epilogue: &FusedEpilogue<T>,
    tile: &[[f32; PANEL]],
    region: TileRegion,
    to: OutputTiles<T>,
) {
    let TileRegion { row, rows, column, columns } = region;
    for (row, line) in (row..row + rows).zip(tile) {
        let start = row * epilogue.outputs + column;
        let of_sample = row / epilogue.rows_per_sample * epilogue.outputs + column;
        for (i, (to, sum)) in to.line(start, columns).iter_mut().zip(line).enumerate() {
            let mut sum = *sum;
            sum += epilogue.bias.map_or(0.0, |bias| bias[column + i]);
            sum += epilogue.per_sample.map_or(0.0, |shift| shift[of_sample + i]);
            sum = match epilogue.activation {
                None => sum,
                Some(Activation::Silu) => silu(sum),
                Some(Activation::Gelu) => gelu(sum),
                Some(Activation::QuickGelu) => quick_gelu(sum),
            };
            sum += epilogue.residual.map_or(0.0, |residual| residual[start + i].widen());
            to.write(T::round(sum));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm512_abs_ps, _mm512_cmp_ps_mask, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mask_sub_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_rcp14_ps, _mm512_roundscale_ps,
        _mm512_scalef_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_sub_ps,
    };

    use super::{LANES, Lanes};

    /// [`super::gelu`] with a shorter `P` and an approximate reciprocal, to 2e-4: a tenth of the precision of bf16.
    #[expect(unsafe_code, reason = "vector instructions on pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn gate(value: Lanes, gate: Lanes) -> Lanes {
        const P: [f32; 6] = [9.599_125e-2, 9.214_285e-2, 1.082_969_4e-1, 4.406_779_6e-2, 7.460_913e-2, 8.491_585e-2];
        /// The coefficients of `2^r` within half of 0.
        const POWER: [f32; 5] = [9.999_993e-1, 6.931_218e-1, 2.402_474_4e-1, 5.591_786e-2, 9.570_102e-3];
        /// The tail is zero beyond it.
        const TAIL_END: f32 = 20.0;
        // SAFETY: both arrays have 16 numbers.
        let (v, x) = unsafe { (_mm512_loadu_ps(value.as_ptr()), _mm512_loadu_ps(gate.as_ptr())) };
        // If one operand is NaN, `min` returns the second.
        let z = _mm512_min_ps(_mm512_set1_ps(TAIL_END), _mm512_abs_ps(x));
        let one = _mm512_set1_ps(1.0);
        let t = _mm512_rcp14_ps(_mm512_fmadd_ps(z, _mm512_set1_ps(0.24), one));
        let series = |terms: &[f32], at| {
            let first = terms.iter().rev().take(1).fold(_mm512_setzero_ps(), |_, term| _mm512_set1_ps(*term));
            terms.iter().rev().skip(1).fold(first, |p, term| _mm512_fmadd_ps(p, at, _mm512_set1_ps(*term)))
        };
        // e^(-z²/2)
        let exponent = _mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-0.5 * std::f32::consts::LOG2_E));
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(exponent);
        let power = _mm512_scalef_ps(series(&POWER, _mm512_sub_ps(exponent, n)), n);
        let tail = _mm512_mul_ps(_mm512_mul_ps(series(&P, t), t), power);
        let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_setzero_ps());
        let phi = _mm512_mask_sub_ps(tail, !negative, one, tail);
        let y = _mm512_mul_ps(v, _mm512_mul_ps(x, phi));
        let mut gated = [0.0; LANES];
        // SAFETY: the array has 16 numbers.
        unsafe { _mm512_storeu_ps(gated.as_mut_ptr(), y) }
        gated
    }
}

multiversion! {
    /// Converts i32 sums of products of bytes to results in place: `(sum - offset) · step of the row · scale`.
    fn dequantize_tile(
        tile: &mut [f32],
        left: &QuantizedActivations,
        row: usize,
        scales: &[f32; PANEL],
        offsets: &[i32; PANEL],
    ) {
        for (i, line) in tile.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let step = left.step(row + i);
            for ((sum, scale), offset) in line.iter_mut().zip(scales).zip(offsets) {
                *sum = (sum.to_bits() as i32).wrapping_sub(*offset) as f32 * step * scale;
            }
        }
    }

    /// Writes a tile of sums, `[rows, 32]`.
    fn write_tile<T>(epilogue: &FusedEpilogue<T>, tile: &[f32], region: TileRegion, to: OutputTiles<T>) {
        let lines = tile.as_chunks().0;
        if region.columns < PANEL {
            return write_partial_tile(epilogue, lines, region, to);
        }
        match epilogue.activation {
            None => write_full_tile(epilogue, lines, region, to, |sum| sum),
            Some(Activation::Silu) => write_full_tile(epilogue, lines, region, to, silu),
            Some(Activation::Gelu) => write_full_tile(epilogue, lines, region, to, gelu),
            Some(Activation::QuickGelu) => write_full_tile(epilogue, lines, region, to, quick_gelu),
        }
    }

    /// Writes `value · gelu(gate)`, 32 columns. The bias of a gate stands `outputs` after the bias of its value.
    fn write_gated_tile<T>(epilogue: &FusedEpilogue<T>, value: &[f32], gates: &[f32], region: TileRegion, to: OutputTiles<T>) {
        let at = |column| [block(epilogue.bias, column), block(epilogue.bias, column + LANES)];
        let (biases, gate_biases) = (at(region.column), at(epilogue.outputs + region.column));
        let lines = value.as_chunks::<PANEL>().0.iter().zip(gates.as_chunks::<PANEL>().0);
        for (row, (value, line)) in (region.row..region.row + region.rows).zip(lines) {
            for (at, (bias, gate_bias)) in [0, LANES].into_iter().zip(biases.into_iter().zip(gate_biases)) {
                let (Some(value), Some(line)) = (value[at..].first_chunk(), line[at..].first_chunk()) else { return };
                let (mut value, mut line): (Lanes, Lanes) = (*value, *line);
                if let (Some(bias), Some(gate_bias)) = (bias, gate_bias) {
                    (value, line) = (add(value, bias), add(line, gate_bias));
                }
                let start = row * epilogue.outputs + region.column + at;
                if let Some(to) = to.line(start, LANES).first_chunk_mut() {
                    T::round_block(&gate::<T>(value, line), to);
                }
            }
        }
    }
}
