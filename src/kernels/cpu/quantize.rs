//! Activations as bytes: each row, or each sample, divided into 127 steps either side of zero, the greatest of its numbers
//! exactly. A number is its byte times the step.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::micro::Micro;
use crate::kernels::cpu::parallel::{for_each, make_rows, rows_per_block};
use crate::kernels::cpu::simd::levels;

/// The greatest byte, either side of zero. The same on both, so that no two products overflow 16 bits.
const TOP: f32 = 127.0;
/// Numbers whose greatest is smaller than this are taken for zeros: the reciprocal of their step would overflow.
const LEAST: f32 = 1e-30;
/// Adding it rounds to an integer, ties to even, and leaves that integer in the low bits.
const ROUNDER: f32 = 12_582_912.0; // 1.5 · 2²³

/// How numbers become bytes.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// What one step of a byte is worth; NaN where a number is not finite, so that every result is NaN.
    pub(crate) step: f32,
    inverse: f32,
}

impl Scale {
    /// `greatest` of the numbers as [`greatest`] gives it.
    #[inline(always)]
    pub(crate) fn new(greatest: u32) -> Self {
        let top = f32::from_bits(greatest);
        if !top.is_finite() {
            Self { step: f32::NAN, inverse: 0.0 }
        } else if top < LEAST {
            Self { step: 0.0, inverse: 0.0 }
        } else {
            Self { step: top / TOP, inverse: TOP / top }
        }
    }

    /// The nearest byte, ties to even.
    #[inline(always)]
    pub(crate) fn byte<T: Element>(self, number: T) -> i8 {
        (number.widen() * self.inverse + ROUNDER).to_bits() as i8
    }
}

levels! {
    /// The bits of the greatest magnitude; those of a NaN are greater than any number's.
    fn greatest<T>(numbers: &[T]) -> u32 {
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

    /// `zero` is the byte that stands for 0.
    fn put_bytes<T>(numbers: &[T], scale: Scale, zero: u8, to: &mut [u8]) {
        for (to, number) in to.iter_mut().zip(numbers) {
            *to = (scale.byte(*number) as u8).wrapping_add(zero);
        }
    }
}

/// A left operand of bytes.
pub(crate) struct Bytes {
    /// In the order of what they were made from.
    pub(crate) numbers: Vec<u8>,
    steps: Vec<f32>,
    /// Rows of the result that have one step.
    each: usize,
    /// Whose operands they are.
    pub(crate) micro: Micro,
}

impl Bytes {
    /// Every row of `length` numbers by itself.
    pub(crate) fn by_row<T: Element>(from: &[T], length: usize) -> Self {
        let rows = from.len() / length.max(1);
        let steps: Vec<AtomicU32> = std::iter::repeat_with(AtomicU32::default).take(rows).collect();
        let micro = Micro::int8();
        let zero = micro.operands.zero();
        let numbers = make_rows::<u8>(rows, length, |first, run| {
            let lines = run.chunks_exact_mut(length).zip(from[first * length..].chunks_exact(length));
            for ((to, line), step) in lines.zip(&steps[first..]) {
                let scale = Scale::new(greatest(line));
                put_bytes(line, scale, zero, to);
                step.store(scale.step.to_bits(), Ordering::Relaxed);
            }
        });
        let steps = steps.into_iter().map(|step| f32::from_bits(step.into_inner())).collect();
        Self { numbers, steps, each: 1, micro }
    }

    /// Each of `samples` feature maps by itself; one of them is `each` rows of the result.
    pub(crate) fn by_sample<T: Element>(from: &[T], samples: usize, each: usize) -> Self {
        let size = from.len() / samples.max(1);
        let tops: Vec<AtomicU32> = std::iter::repeat_with(AtomicU32::default).take(samples).collect();
        let block = rows_per_block(1);
        let blocks = size.div_ceil(block);
        for_each(samples * blocks, from.len(), |task| {
            let (sample, start) = (task / blocks, (task % blocks) * block);
            let numbers = &from[sample * size + start..sample * size + (start + block).min(size)];
            tops[sample].fetch_max(greatest(numbers), Ordering::Relaxed);
        });
        let scales: Vec<Scale> = tops.into_iter().map(|top| Scale::new(top.into_inner())).collect();
        let micro = Micro::int8();
        let zero = micro.operands.zero();
        let numbers = make_rows::<u8>(from.len(), 1, |first, run| {
            let mut done = 0;
            while done < run.len() {
                let (sample, at) = ((first + done) / size, (first + done) % size);
                let taken = (size - at).min(run.len() - done);
                let numbers = &from[first + done..first + done + taken];
                put_bytes(numbers, scales[sample], zero, &mut run[done..done + taken]);
                done += taken;
            }
        });
        Self { numbers, steps: scales.iter().map(|scale| scale.step).collect(), each: each.max(1), micro }
    }

    /// What a byte is worth that goes into row `row` of the result.
    #[inline(always)]
    pub(crate) fn step(&self, row: usize) -> f32 {
        self.steps[row / self.each]
    }
}
