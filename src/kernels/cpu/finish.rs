//! What follows a product: bias, time embedding, activation, residual, GEGLU, applied to a tile of sums while it is in
//! the cache, and the rounding to the dtype of the activations.

use super::element::Element;
use super::micro::{self, PANEL};
use super::quantise::Bytes;
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
            for (value, gate) in value.iter_mut().zip(gate) {
                *value *= gelu(gate);
            }
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
