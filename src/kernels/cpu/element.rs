//! The number types that the CPU kernels read and write, and their conversions to and from f32.

use std::mem::MaybeUninit;

use candle_core::WithDType;
use half::{bf16, f16};

use crate::allocator::FromBits;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd;

/// A dtype that widens to f32 exactly and that f32 is rounded to.
pub(crate) trait Element: WithDType + FromBits + Send + Sync {
    const IS_F32: bool;

    fn widen(self) -> f32;

    /// Rounds to nearest, ties to even; NaN stays NaN.
    fn round(value: f32) -> Self;

    /// [`Self::round`] of 16 numbers.
    #[inline(always)]
    fn round_block(from: &[f32; 16], to: &mut [MaybeUninit<Self>; 16]) {
        for (to, from) in to.iter_mut().zip(from) {
            to.write(Self::round(*from));
        }
    }

    /// Rounds 16 numbers with [`Self::round_block`] and widens them again.
    #[expect(unsafe_code, reason = "16 numbers are read that were just written")]
    #[inline(always)]
    fn round_trip_block(block: &mut [f32; 16]) {
        let mut narrow = [const { MaybeUninit::uninit() }; 16];
        Self::round_block(block, &mut narrow);
        for (number, narrow) in block.iter_mut().zip(narrow) {
            // SAFETY: `round_block` writes all 16 numbers.
            *number = unsafe { narrow.assume_init() }.widen();
        }
    }
}

impl Element for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        let bits = value.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits((if value.is_nan() { quiet } else { nearest }) as u16)
    }

    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "a function compiled for more than the baseline")]
    #[inline(always)]
    fn round_block(from: &[f32; 16], to: &mut [MaybeUninit<Self>; 16]) {
        if simd::rounds_bf16() {
            // SAFETY: the level has AVX-512 BF16.
            unsafe { round_native(from, to) }
        } else {
            for (to, from) in to.iter_mut().zip(from) {
                to.write(Self::round(*from));
            }
        }
    }
}

/// Rounds as [`bf16::round`] does, except that numbers below 2^-126 become zeros.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions on pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round_native(from: &[f32; 16], to: &mut [MaybeUninit<bf16>; 16]) {
    use std::arch::x86_64::{__m256bh, __m256i, _mm256_storeu_si256, _mm512_cvtneps_pbh, _mm512_loadu_ps};
    // SAFETY: 16 numbers are read and 16 written; any bits are bf16.
    unsafe {
        let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from.as_ptr())));
        _mm256_storeu_si256(to.as_mut_ptr().cast(), narrow);
    }
}

/// Quantized activations.
impl Element for u8 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        value.round_ties_even() as Self
    }
}

impl Element for f16 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = bits & 0x7fff;
        let normal = (magnitude << 13) + (112 << 23);
        // Subnormals are converted as integers: f32 subnormals as intermediate values would be slow.
        let subnormal = (magnitude as i32 as f32 * (1.0 / 16_777_216.0)).to_bits();
        let special = (magnitude << 13) | 0x7f80_0000;
        let wide = if magnitude < 0x400 { subnormal } else { normal };
        let wide = if magnitude >= 0x7c00 { special } else { wide };
        f32::from_bits(wide | ((bits & 0x8000) << 16))
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// The memory of some numbers.
#[expect(unsafe_code, reason = "numbers seen as their bytes")]
pub(crate) fn as_bytes<T: Element>(numbers: &[T]) -> &[u8] {
    // SAFETY: the bytes are the memory of the numbers and borrowed as long; f32, bf16, f16 and u8 have no padding.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The memory of some numbers, for writing.
#[expect(unsafe_code, reason = "numbers seen as their bytes")]
pub(crate) fn as_bytes_mut(numbers: &mut [f32]) -> &mut [u8] {
    // SAFETY: the bytes are the memory of the numbers and borrowed as long; any bits are an f32.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
