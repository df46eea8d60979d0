//! What follows a product: bias, time embedding, activation, residual, GEGLU, applied to a tile of sums while it is in
//! the cache, and the rounding to the dtype of the activations.

use super::element::Element;
use super::micro::{self, PANEL};
use super::quantise::Bytes;
#[cfg(target_arch = "x86_64")]
use super::simd::rounds_bf16;
use super::simd::{gelu, levels, quick_gelu, silu};
use crate::kernels::Activation;

/// All that may follow; every part is over the whole result.
pub(super) struct Finish<'a, T> {
    /// `[O]`
    pub(super) bias: Option<&'a [f32]>,
    /// `[B, O]`
    pub(super) per_sample: Option<&'a [f32]>,
    pub(super) activation: Option<Activation>,
    /// `[rows, O]`
    pub(super) residual: Option<&'a [T]>,
    /// Rows of one sample.
    pub(super) sample: usize,
    /// `O`
    pub(super) outputs: usize,
}

/// Where a tile lies in the result.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) column: usize,
    /// At most 32.
    pub(super) columns: usize,
}

impl<T> Finish<'_, T> {
    /// Asks for the lines that `spot` will read and write.
    pub(super) fn fetch(&self, spot: Spot, to: *const T) {
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

/// Adds as many numbers as there are; 32 of them in one go.
#[inline(always)]
fn add<T: Element>(line: &mut [f32; PANEL], from: &[T]) {
    if let Ok(from) = <&[T; PANEL]>::try_from(from) {
        for (to, from) in line.iter_mut().zip(from) {
            *to += from.widen();
        }
    } else {
        for (to, from) in line.iter_mut().zip(from) {
            *to += from.widen();
        }
    }
}

#[inline(always)]
fn put<T: Element>(line: &[f32; PANEL], to: &mut [T]) {
    if to.len() == PANEL {
        for (to, from) in to.as_chunks_mut::<16>().0.iter_mut().zip(line.as_chunks::<16>().0) {
            T::round_block(from, to);
        }
    } else {
        for (to, from) in to.iter_mut().zip(line) {
            *to = T::round(*from);
        }
    }
}

/// `value · gelu(gate)`, as exact as the results' dtype can show.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "a function compiled for more than the baseline"))]
#[inline(always)]
fn gate_line<T: Element>(value: &mut [f32; PANEL], gate: &[f32; PANEL]) {
    #[cfg(target_arch = "x86_64")]
    if !T::IS_F32 && rounds_bf16() {
        // SAFETY: where the processor rounds to bf16, AVX-512 F is here.
        return unsafe { avx512::gate_line(value, gate) };
    }
    for (value, gate) in value.iter_mut().zip(gate) {
        *value *= gelu(*gate);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm512_abs_ps, _mm512_cmp_ps_mask, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mask_sub_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_rcp14_ps, _mm512_roundscale_ps,
        _mm512_scalef_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_sub_ps,
    };

    use super::PANEL;

    /// As [`super::gelu`] has it, with a shorter `P` and an approximate reciprocal: right to 2e-4, a tenth of what bf16
    /// tells apart.
    #[expect(unsafe_code, reason = "vector instructions on pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn gate_line(value: &mut [f32; PANEL], gate: &[f32; PANEL]) {
        const P: [f32; 6] = [9.599_125e-2, 9.214_285e-2, 1.082_969_4e-1, 4.406_779_6e-2, 7.460_913e-2, 8.491_585e-2];
        /// Of `2^r` within half of 0.
        const POWER: [f32; 5] = [9.999_993e-1, 6.931_218e-1, 2.402_474_4e-1, 5.591_786e-2, 9.570_102e-3];
        /// Beyond it nothing of the tail is left.
        const FAR: f32 = 20.0;
        for (value, gate) in value.as_chunks_mut::<16>().0.iter_mut().zip(gate.as_chunks::<16>().0) {
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
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(value.as_mut_ptr(), y) }
        }
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

    /// `tile` is `[rows, 32]`; line `i` of the result is written by `to(i)`.
    fn finish_tile<T>(finish: &Finish<T>, tile: &[f32], spot: Spot, to: Target<T>) {
        let Spot { row, rows, column, columns } = spot;
        for (i, line) in tile.as_chunks::<PANEL>().0.iter().take(rows).enumerate() {
            let mut line = *line;
            if let Some(bias) = finish.bias {
                add(&mut line, &bias[column..column + columns]);
            }
            if let Some(per_sample) = finish.per_sample {
                let start = (row + i) / finish.sample * finish.outputs + column;
                add(&mut line, &per_sample[start..start + columns]);
            }
            match finish.activation {
                None => {}
                Some(Activation::Silu) => line = line.map(silu),
                Some(Activation::Gelu) => line = line.map(gelu),
                Some(Activation::QuickGelu) => line = line.map(quick_gelu),
            }
            if let Some(residual) = finish.residual {
                let start = (row + i) * finish.outputs + column;
                add(&mut line, &residual[start..start + columns]);
            }
            put(&line, to.line((row + i) * finish.outputs + column, columns));
        }
    }

    /// `value · gelu(gate)`; the bias of the gates stands `outputs` after that of the values.
    fn finish_gated<T>(finish: &Finish<T>, value: &[f32], gate: &[f32], spot: Spot, to: Target<T>) {
        let Spot { row, rows, column, columns } = spot;
        let lines = value.as_chunks::<PANEL>().0.iter().zip(gate.as_chunks::<PANEL>().0);
        for (i, (value, gate)) in lines.take(rows).enumerate() {
            let (mut value, mut gate) = (*value, *gate);
            if let Some(bias) = finish.bias {
                add(&mut value, &bias[column..column + columns]);
                add(&mut gate, &bias[finish.outputs + column..finish.outputs + column + columns]);
            }
            gate_line::<T>(&mut value, &gate);
            put(&value, to.line((row + i) * finish.outputs + column, columns));
        }
    }
}

/// The memory of a result, of which every task writes its own tiles.
pub(super) struct Target<T>(*mut T);

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
    pub(super) unsafe fn new(all: *mut T) -> Self {
        Self(all)
    }

    #[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
    #[inline(always)]
    pub(super) fn line<'a>(self, start: usize, count: usize) -> &'a mut [T] {
        // SAFETY: that of `new`.
        unsafe { std::slice::from_raw_parts_mut(self.0.wrapping_add(start), count) }
    }
}
