//! Activations as bytes: each row, or each sample, is divided into 127 steps on either side of zero, so that its largest
//! number is exact. A number is its byte times the step.
#![expect(unsafe_code, reason = "results are written to uninitialized memory")]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::micro::MicroKernel;
use crate::kernels::cpu::parallel::{for_each, make_rows, rows_per_block};
use crate::kernels::cpu::simd::multiversion;

/// The largest byte on either side of zero. The range is symmetric, so that no two products overflow 16 bits.
const MAX_BYTE: f32 = 127.0;
/// Numbers whose largest magnitude is below this are treated as zeros: the reciprocal of their step would overflow.
const MIN_MAGNITUDE: f32 = 1e-30;
/// Adding it rounds to an integer, ties to even, and leaves that integer in the low bits.
const ROUNDER: f32 = 12_582_912.0; // 1.5 · 2²³

/// The conversion of numbers to bytes.
#[derive(Clone, Copy)]
pub(crate) struct QuantScale {
    /// The value of one step; NaN if a number is not finite, so that every result is NaN.
    pub(crate) step: f32,
    inverse: f32,
}

impl QuantScale {
    /// `max_bits` is the [`max_magnitude_bits`] of the numbers.
    #[inline(always)]
    pub(crate) fn new(max_bits: u32) -> Self {
        let max = f32::from_bits(max_bits);
        if !max.is_finite() {
            Self { step: f32::NAN, inverse: 0.0 }
        } else if max < MIN_MAGNITUDE {
            Self { step: 0.0, inverse: 0.0 }
        } else {
            Self { step: max / MAX_BYTE, inverse: MAX_BYTE / max }
        }
    }

    /// The nearest byte, ties to even.
    #[inline(always)]
    pub(crate) fn byte<T: Element>(self, number: T) -> i8 {
        (number.widen() * self.inverse + ROUNDER).to_bits() as i8
    }
}

multiversion! {
    /// The bits of the largest magnitude. A NaN's bits exceed any number's.
    fn max_magnitude_bits<T>(numbers: &[T]) -> u32 {
        let mut lanes = [0_u32; 32];
        let (blocks, rest) = numbers.as_chunks::<32>();
        for block in blocks {
            for (lane, number) in lanes.iter_mut().zip(block) {
                *lane = (*lane).max(number.widen().to_bits() & 0x7fff_ffff);
            }
        }
        for (lane, number) in lanes.iter_mut().zip(rest) {
            *lane = (*lane).max(number.widen().to_bits() & 0x7fff_ffff);
        }
        lanes.into_iter().fold(0, u32::max)
    }

    /// Writes the bytes of `numbers`; `zero` is the byte that represents 0.
    fn write_bytes<T>(numbers: &[T], scale: QuantScale, zero: u8, to: &mut [MaybeUninit<u8>]) {
        for (to, number) in to.iter_mut().zip(numbers) {
            to.write((scale.byte(*number) as u8).wrapping_add(zero));
        }
    }
}

/// A left operand of bytes.
pub(crate) struct QuantizedActivations {
    /// The bytes, in the order of the numbers.
    pub(crate) bytes: Vec<u8>,
    steps: Vec<f32>,
    /// Rows of the result that share a step.
    rows_per_step: usize,
    /// The micro-kernel that the bytes are operands of.
    pub(crate) micro: MicroKernel,
}

impl QuantizedActivations {
    /// Quantizes every row of `length` numbers by itself.
    pub(crate) fn by_row<T: Element>(from: &[T], length: usize) -> Self {
        let rows = from.len() / length.max(1);
        let steps: Vec<AtomicU32> = std::iter::repeat_with(AtomicU32::default).take(rows).collect();
        let micro = MicroKernel::int8();
        let zero = micro.operands.zero_byte();
        let fill = |first: usize, run: &mut [MaybeUninit<u8>]| {
            let lines = run.chunks_exact_mut(length).zip(from[first * length..].chunks_exact(length));
            for ((to, line), step) in lines.zip(&steps[first..]) {
                let scale = QuantScale::new(max_magnitude_bits(line));
                write_bytes(line, scale, zero, to);
                step.store(scale.step.to_bits(), Ordering::Relaxed);
            }
        };
        // SAFETY: a run is whole rows, and `fill` writes each of them.
        let bytes = unsafe { make_rows(rows, length, fill) };
        let steps = steps.into_iter().map(|step| f32::from_bits(step.into_inner())).collect();
        Self { bytes, steps, rows_per_step: 1, micro }
    }

    /// Quantizes each of `samples` feature maps by itself; one of them gives `rows_per_sample` rows of the result.
    pub(crate) fn by_sample<T: Element>(from: &[T], samples: usize, rows_per_sample: usize) -> Self {
        let size = from.len() / samples.max(1);
        let maxima: Vec<AtomicU32> = std::iter::repeat_with(AtomicU32::default).take(samples).collect();
        let block = rows_per_block(1);
        let blocks = size.div_ceil(block);
        for_each(samples * blocks, from.len(), |task| {
            let (sample, start) = (task / blocks, (task % blocks) * block);
            let numbers = &from[sample * size + start..sample * size + (start + block).min(size)];
            maxima[sample].fetch_max(max_magnitude_bits(numbers), Ordering::Relaxed);
        });
        let scales: Vec<QuantScale> = maxima.into_iter().map(|max| QuantScale::new(max.into_inner())).collect();
        let micro = MicroKernel::int8();
        let zero = micro.operands.zero_byte();
        let fill = |first: usize, run: &mut [MaybeUninit<u8>]| {
            let mut done = 0;
            while done < run.len() {
                let (sample, at) = ((first + done) / size, (first + done) % size);
                let taken = (size - at).min(run.len() - done);
                let numbers = &from[first + done..first + done + taken];
                write_bytes(numbers, scales[sample], zero, &mut run[done..done + taken]);
                done += taken;
            }
        };
        // SAFETY: `fill` writes the numbers of one sample after the other until the run is full.
        let bytes = unsafe { make_rows(from.len(), 1, fill) };
        let steps = scales.iter().map(|scale| scale.step).collect();
        Self { bytes, steps, rows_per_step: rows_per_sample.max(1), micro }
    }

    /// The step of the activations that row `row` of the result is computed from.
    #[inline(always)]
    pub(crate) fn step(&self, row: usize) -> f32 {
        self.steps[row / self.rows_per_step]
    }
}
