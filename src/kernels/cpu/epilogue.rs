//! What follows a product: bias, time embedding, activation, residual, GEGLU, applied to a tile of sums while it is in
//! the cache, and the rounding to the dtype of the activations.

use crate::kernels::Activation;
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::micro::{self, PANEL};
use crate::kernels::cpu::quantize::Bytes;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd::rounds_bf16;
use crate::kernels::cpu::simd::{gelu, levels, quick_gelu, silu};

/// All that may follow; every part is over the whole result.
pub(crate) struct Finish<'a, T> {
    /// `[O]`
    pub(crate) bias: Option<&'a [f32]>,
    /// `[B, O]`
    pub(crate) per_sample: Option<&'a [f32]>,
    pub(crate) activation: Option<Activation>,
    /// `[rows, O]`
    pub(crate) residual: Option<&'a [T]>,
    /// Rows of one sample.
    pub(crate) sample: usize,
    /// `O`
    pub(crate) outputs: usize,
}

/// Where a tile lies in the result.
#[derive(Clone, Copy)]
pub(crate) struct Spot {
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) column: usize,
    /// At most 32.
    pub(crate) columns: usize,
}

impl<T> Finish<'_, T> {
    /// Asks for the lines that `spot` will read and write.
    pub(crate) fn fetch(&self, spot: Spot, to: *const T) {
        let bytes = spot.columns * size_of::<T>();
        for row in spot.row..spot.row + spot.rows {
            let at = row * self.outputs + spot.column;
            if let Some(residual) = self.residual {
                micro::prefetch(residual.as_ptr().wrapping_add(at).cast(), bytes);
            }
            micro::prefetch(to.wrapping_add(at).cast(), bytes);
        }
    }
}

/// Columns of a tile that are finished at once. They are handed on by value, so that they stay in a register.
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

/// `value` of each.
#[inline(always)]
fn each(lanes: Lanes, value: impl Fn(f32) -> f32) -> Lanes {
    let mut values = [0.0; LANES];
    for i in 0..LANES {
        values[i] = value(lanes[i]);
    }
    values
}

/// `value · gelu(gate)`, as exact as the results' dtype can show.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "a function compiled for more than the baseline"))]
#[inline(always)]
fn gate<T: Element>(value: Lanes, gate: Lanes) -> Lanes {
    #[cfg(target_arch = "x86_64")]
    if !T::IS_F32 && rounds_bf16() {
        // SAFETY: where the processor rounds to bf16, AVX-512 F is here.
        return unsafe { avx512::gate(value, gate) };
    }
    let mut gated = [0.0; LANES];
    for i in 0..LANES {
        gated[i] = value[i] * gelu(gate[i]);
    }
    gated
}

/// The columns of `from` that begin with `first`, and nothing where it has no 16 of them.
#[inline(always)]
fn block<T>(from: Option<&[T]>, first: usize) -> Option<&[T; LANES]> {
    from.and_then(|from| from.get(first..)?.first_chunk())
}

/// All rows, 16 columns at a time; `activate` is the activation.
#[inline(always)]
fn finish_whole<T: Element>(
    finish: &Finish<T>,
    tile: &[[f32; PANEL]],
    spot: Spot,
    to: Target<T>,
    activate: impl Fn(f32) -> f32,
) {
    let biases = [block(finish.bias, spot.column), block(finish.bias, spot.column + LANES)];
    for (row, line) in (spot.row..spot.row + spot.rows).zip(tile) {
        for (at, bias) in [0, LANES].into_iter().zip(biases) {
            let column = spot.column + at;
            let Some(mut lanes) = line[at..].first_chunk::<LANES>().copied() else { return };
            if let Some(bias) = bias {
                lanes = add(lanes, bias);
            }
            if finish.per_sample.is_some()
                && let Some(shift) = block(finish.per_sample, row / finish.sample * finish.outputs + column)
            {
                lanes = add(lanes, shift);
            }
            lanes = each(lanes, &activate);
            let start = row * finish.outputs + column;
            if let Some(residual) = block(finish.residual, start) {
                lanes = add(lanes, residual);
            }
            if let Some(to) = to.line(start, LANES).first_chunk_mut() {
                T::round_block(&lanes, to);
            }
        }
    }
}

/// As [`finish_whole`], for as many columns as there are.
#[inline(always)]
fn finish_part<T: Element>(finish: &Finish<T>, tile: &[[f32; PANEL]], spot: Spot, to: Target<T>) {
    let Spot { row, rows, column, columns } = spot;
    for (row, line) in (row..row + rows).zip(tile) {
        let start = row * finish.outputs + column;
        let of_sample = row / finish.sample * finish.outputs + column;
        for (i, (to, sum)) in to.line(start, columns).iter_mut().zip(line).enumerate() {
            let mut sum = *sum;
            sum += finish.bias.map_or(0.0, |bias| bias[column + i]);
            sum += finish.per_sample.map_or(0.0, |shift| shift[of_sample + i]);
            sum = match finish.activation {
                None => sum,
                Some(Activation::Silu) => silu(sum),
                Some(Activation::Gelu) => gelu(sum),
                Some(Activation::QuickGelu) => quick_gelu(sum),
            };
            sum += finish.residual.map_or(0.0, |residual| residual[start + i].widen());
            *to = T::round(sum);
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

    /// As [`super::gelu`] has it, with a shorter `P` and an approximate reciprocal: right to 2e-4, a tenth of what bf16
    /// tells apart.
    #[expect(unsafe_code, reason = "vector instructions on pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn gate(value: Lanes, gate: Lanes) -> Lanes {
        const P: [f32; 6] = [9.599_125e-2, 9.214_285e-2, 1.082_969_4e-1, 4.406_779_6e-2, 7.460_913e-2, 8.491_585e-2];
        /// Of `2^r` within half of 0.
        const POWER: [f32; 5] = [9.999_993e-1, 6.931_218e-1, 2.402_474_4e-1, 5.591_786e-2, 9.570_102e-3];
        /// Beyond it nothing of the tail is left.
        const FAR: f32 = 20.0;
        // SAFETY: 16 numbers are there.
        let (v, x) = unsafe { (_mm512_loadu_ps(value.as_ptr()), _mm512_loadu_ps(gate.as_ptr())) };
        // Of a number and a NaN, `min` gives its second operand.
        let z = _mm512_min_ps(_mm512_set1_ps(FAR), _mm512_abs_ps(x));
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
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(gated.as_mut_ptr(), y) }
        gated
    }
}

levels! {
    /// i32 sums of products of bytes to what they stand for, in place: `(sum - offset) · step of the row · scale`.
    fn rescale(tile: &mut [f32], bytes: &Bytes, row: usize, scales: &[f32; PANEL], offsets: &[i32; PANEL]) {
        for (i, line) in tile.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let step = bytes.step(row + i);
            for ((sum, scale), offset) in line.iter_mut().zip(scales).zip(offsets) {
                *sum = (sum.to_bits() as i32).wrapping_sub(*offset) as f32 * step * scale;
            }
        }
    }

    /// `tile` is `[rows, 32]`.
    fn finish_tile<T>(finish: &Finish<T>, tile: &[f32], spot: Spot, to: Target<T>) {
        let lines = tile.as_chunks().0;
        if spot.columns < PANEL {
            return finish_part(finish, lines, spot, to);
        }
        match finish.activation {
            None => finish_whole(finish, lines, spot, to, |sum| sum),
            Some(Activation::Silu) => finish_whole(finish, lines, spot, to, silu),
            Some(Activation::Gelu) => finish_whole(finish, lines, spot, to, gelu),
            Some(Activation::QuickGelu) => finish_whole(finish, lines, spot, to, quick_gelu),
        }
    }

    /// `value · gelu(gate)`, all 32 columns; the bias of the gates stands `outputs` after that of the values.
    fn finish_gated<T>(finish: &Finish<T>, value: &[f32], gates: &[f32], spot: Spot, to: Target<T>) {
        let at = |column| [block(finish.bias, column), block(finish.bias, column + LANES)];
        let (biases, of_gates) = (at(spot.column), at(finish.outputs + spot.column));
        let lines = value.as_chunks::<PANEL>().0.iter().zip(gates.as_chunks::<PANEL>().0);
        for (row, (value, line)) in (spot.row..spot.row + spot.rows).zip(lines) {
            for (at, (bias, of_gates)) in [0, LANES].into_iter().zip(biases.into_iter().zip(of_gates)) {
                let (Some(value), Some(line)) = (value[at..].first_chunk(), line[at..].first_chunk()) else { return };
                let (mut value, mut line): (Lanes, Lanes) = (*value, *line);
                if let (Some(bias), Some(of_gates)) = (bias, of_gates) {
                    (value, line) = (add(value, bias), add(line, of_gates));
                }
                let start = row * finish.outputs + spot.column + at;
                if let Some(to) = to.line(start, LANES).first_chunk_mut() {
                    T::round_block(&gate::<T>(value, line), to);
                }
            }
        }
    }
}

/// The memory of a result, of which every task writes its own tiles.
pub(crate) struct Target<T>(*mut T);

impl<T> Clone for Target<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Target<T> {}

impl<T> Target<T> {
    /// # Safety
    /// No other task writes, and nothing reads, the lines that the tile covers; they lie within the result.
    #[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
    pub(crate) unsafe fn new(all: *mut T) -> Self {
        Self(all)
    }

    #[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
    #[inline(always)]
    pub(crate) fn line<'a>(self, start: usize, count: usize) -> &'a mut [T] {
        // SAFETY: that of `new`.
        unsafe { std::slice::from_raw_parts_mut(self.0.wrapping_add(start), count) }
    }
}
