//! Elementwise loops over slices: widening, scaling, activations.

use std::mem::MaybeUninit;

use half::f16;

use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::math::{gelu, quick_gelu, silu};
use crate::kernels::cpu::parallel::make_rows;
use crate::kernels::cpu::simd::multiversion;
use crate::kernels::epilogue::Activation;

/// Numbers of a block, which the compiler keeps in registers.
const LANES: usize = 16;

/// Writes the rounded `value` of each number of `from`.
#[inline(always)]
fn map_into<T: Element>(from: &[T], to: &mut [MaybeUninit<T>], value: impl Fn(f32) -> f32) {
    let ((blocks, rest), (to_blocks, to_rest)) = (from.as_chunks::<LANES>(), to.as_chunks_mut::<LANES>());
    for (to, from) in to_blocks.iter_mut().zip(blocks) {
        let mut line = [0.0; LANES];
        for (line, x) in line.iter_mut().zip(from) {
            *line = value(x.widen());
        }
        T::round_block(&line, to);
    }
    for (to, from) in to_rest.iter_mut().zip(rest) {
        to.write(T::round(value(from.widen())));
    }
}

multiversion! {
    fn widen_slice<T>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }

    /// Widens `[n, 32, 2]` bf16 to `[2n, 32]`.
    fn widen_pairs(from: &[u32], to: &mut [f32]) {
        for (to, from) in to.as_chunks_mut::<64>().0.iter_mut().zip(from.as_chunks::<32>().0) {
            let (even, odd) = to.split_at_mut(32);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(from) {
                *even = f32::from_bits(pair << 16);
                *odd = f32::from_bits(pair & 0xffff_0000);
            }
        }
    }

    /// Widens `[n, 32, 2]` f16 to `[2n, 32]`.
    fn widen_half_pairs(from: &[u32], to: &mut [f32]) {
        for (to, from) in to.as_chunks_mut::<64>().0.iter_mut().zip(from.as_chunks::<32>().0) {
            let (even, odd) = to.split_at_mut(32);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(from) {
                *even = f16::from_bits(*pair as u16).widen();
                *odd = f16::from_bits((pair >> 16) as u16).widen();
            }
        }
    }

    fn scale(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }

    /// Rounds `from · factor`.
    fn round_scaled<T>(from: &[f32], factor: f32, to: &mut [MaybeUninit<T>]) {
        for (to, from) in to.iter_mut().zip(from) {
            to.write(T::round(from * factor));
        }
    }

    fn silu_into<T>(from: &[T], to: &mut [MaybeUninit<T>]) {
        map_into(from, to, silu);
    }

    fn gelu_into<T>(from: &[T], to: &mut [MaybeUninit<T>]) {
        map_into(from, to, gelu);
    }

    fn quick_gelu_into<T>(from: &[T], to: &mut [MaybeUninit<T>]) {
        map_into(from, to, quick_gelu);
    }

    /// `value · gelu(gate)`
    fn gated<T>(value: &[f32], gate: &[f32], to: &mut [MaybeUninit<T>]) {
        for ((to, value), gate) in to.iter_mut().zip(value).zip(gate) {
            to.write(T::round(value * gelu(*gate)));
        }
    }
}

/// The activation of every number.
#[expect(unsafe_code, reason = "results are written to uninitialized memory")]
pub(crate) fn activate<T: Element>(kind: Activation, from: &[T]) -> Vec<T> {
    let fill = |first: usize, out: &mut [MaybeUninit<T>]| {
        let from = &from[first..first + out.len()];
        match kind {
            Activation::Silu => silu_into(from, out),
            Activation::Gelu => gelu_into(from, out),
            Activation::QuickGelu => quick_gelu_into(from, out),
        }
    };
    // SAFETY: each of these functions writes as many numbers as it reads.
    unsafe { make_rows(from.len(), 1, fill) }
}
