//! Decodes the number formats of weight files, [`GRAIN`] numbers at a time where a file stores blocks. The block layouts are
//! defined in <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>; sums and products are computed in f32, in
//! the order in which `d · q + m` is written there.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::block_format::{Coding, GRAIN};
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::elementwise;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd;
use crate::kernels::cpu::simd::multiversion;
use crate::kernels::cpu::tensor_guard::TensorGuard;
use crate::kernels::stored_weight::StoredWeight;

/// Weights in the format of their file, `[outputs, depth]`.
pub(crate) struct EncodedRows<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) coding: Coding,
    /// The dtype that the numbers are rounded to; f32 if they are not rounded.
    pub(crate) rounded: DType,
    /// Multiplier of the numbers.
    pub(crate) scale: f32,
    pub(crate) outputs: usize,
    pub(crate) depth: usize,
}

/// Writes the numbers of `bytes` from number `first` on. For blocks, `first` and the count are multiples of [`GRAIN`].
pub(crate) fn decode(coding: Coding, bytes: &[u8], first: usize, to: &mut [f32]) {
    let (numbers, size) = coding.block();
    let bytes = &bytes[first / numbers * size..];
    match coding {
        Coding::F32 => to.iter_mut().zip(bytes.as_chunks().0).for_each(|(to, from)| *to = f32::from_le_bytes(*from)),
        Coding::F16 => f16s(bytes, to),
        Coding::Bf16 => bf16s(bytes, to),
        Coding::E4m3 => e4m3s(bytes, to),
        Coding::E5m2 => e5m2s(bytes, to),
        Coding::Q4_0 => q4_0(bytes, to),
        Coding::Q4_1 => q4_1(bytes, to),
        Coding::Q5_0 => q5_0(bytes, to),
        Coding::Q5_1 => q5_1(bytes, to),
        Coding::Q8_0 => q8_0(bytes, to),
        Coding::Q2K => q2k(bytes, first % numbers / GRAIN, to),
        Coding::Q3K => q3k(bytes, first % numbers / GRAIN, to),
        Coding::Q4K => q4k(bytes, first % numbers / GRAIN, to),
        Coding::Q5K => q5k(bytes, first % numbers / GRAIN, to),
        Coding::Q6K => q6k(bytes, first % numbers / GRAIN, to),
    }
}

/// [`decode`], times the scale.
pub(crate) fn decode_scaled(rows: &EncodedRows, first: usize, to: &mut [f32]) {
    decode(rows.coding, rows.bytes, first, to);
    if rows.scale != 1.0 {
        elementwise::scale(to, rows.scale);
    }
}

/// [`decode_scaled`], rounded to the dtype of `rows` and widened again.
pub(crate) fn decode_rounded(rows: &EncodedRows, first: usize, to: &mut [f32]) {
    decode_scaled(rows, first, to);
    match rows.rounded {
        DType::BF16 => round_trip(to, bf16::ZERO),
        DType::F16 => round_trip(to, f16::ZERO),
        _ => {}
    }
}

/// All numbers of `weight`, rounded once to `dtype`, which is f32, bf16 or f16.
pub(crate) fn to_tensor(weight: &StoredWeight, dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::BF16 => Tensor::from_vec(numbers::<bf16>(weight)?, weight.dims(), &Device::Cpu),
        DType::F16 => Tensor::from_vec(numbers::<f16>(weight)?, weight.dims(), &Device::Cpu),
        _ => Tensor::from_vec(numbers::<f32>(weight)?, weight.dims(), &Device::Cpu)?.to_dtype(dtype),
    }
}

#[expect(unsafe_code, reason = "results are written to uninitialized memory")]
fn numbers<T: Element>(weight: &StoredWeight) -> Result<Vec<T>> {
    const LINE: usize = 2048;
    let tensor = weight.tensor().contiguous()?;
    let guard = TensorGuard::new(&tensor);
    let count = weight.dims().iter().product::<usize>();
    let (coding, scale) = (weight.coding(), weight.scale());
    let rows = EncodedRows { bytes: guard.bytes()?, coding, rounded: DType::F32, scale, outputs: 1, depth: count };
    let mut all = Box::new_uninit_slice(count);
    all.par_chunks_mut(LINE).enumerate().for_each(|(i, part)| {
        let mut wide = [0.0; LINE];
        let wide = &mut wide[..part.len()];
        decode_scaled(&rows, i * LINE, wide);
        narrow(wide, part);
    });
    // SAFETY: `narrow` has written every part.
    Ok(unsafe { all.assume_init() }.into_vec())
}

/// Rounds f16 numbers of `bytes` from number `first` on to bf16.
pub(crate) fn f16_to_bf16(bytes: &[u8], first: usize, to: &mut [MaybeUninit<bf16>]) {
    let bytes = &bytes[2 * first..2 * (first + to.len())];
    #[cfg(target_arch = "x86_64")]
    if simd::rounds_bf16() {
        let (lines, rest) = to.as_chunks_mut::<32>();
        let (from, from_rest) = bytes.as_chunks::<64>();
        #[expect(unsafe_code, reason = "a function compiled for more than the baseline")]
        // SAFETY: the level has AVX-512 BF16.
        unsafe {
            avx512::f16_to_bf16(from, lines);
        }
        return narrow_f16s(from_rest, rest);
    }
    narrow_f16s(bytes, to);
}

#[inline(always)]
fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).widen()
}

#[inline(always)]
fn e4m3(byte: u8) -> f32 {
    let magnitude = u32::from(byte & 0x7f);
    let normal = (magnitude << 20) + (120 << 23);
    let subnormal = (magnitude as i32 as f32 * (1.0 / 512.0)).to_bits();
    let wide = if magnitude < 8 { subnormal } else { normal };
    let wide = if magnitude == 0x7f { 0x7fc0_0000 } else { wide };
    f32::from_bits(wide | (u32::from(byte & 0x80) << 24))
}

/// Scale and minimum `j` of the twelve bytes in which Q4_K and Q5_K store eight of each, six bits long.
#[inline(always)]
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// Runs `$body` for each part of 32 numbers of blocks of 256; `$first` is the part of the first block to begin with.
macro_rules! parts {
    ($bytes:ident, $first:ident, $to:ident, $size:literal, |$block:ident, $part:ident, $out:ident| $body:block) => {
        let blocks = $bytes.as_chunks::<$size>().0;
        for (i, $out) in ($first..).zip($to.as_chunks_mut::<GRAIN>().0) {
            let ($block, $part) = (&blocks[i / 8], i % 8);
            $body
        }
    };
}

multiversion! {
    fn f16s(bytes: &[u8], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(bytes.as_chunks().0) {
            *to = f16::from_le_bytes(*from).widen();
        }
    }

    fn bf16s(bytes: &[u8], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(bytes.as_chunks().0) {
            *to = bf16::from_le_bytes(*from).widen();
        }
    }

    fn narrow_f16s(bytes: &[u8], to: &mut [MaybeUninit<bf16>]) {
        for (to, from) in to.iter_mut().zip(bytes.as_chunks().0) {
            to.write(bf16::round(f16::from_le_bytes(*from).widen()));
        }
    }

    fn e4m3s(bytes: &[u8], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(bytes) {
            *to = e4m3(*from);
        }
    }

    fn e5m2s(bytes: &[u8], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(bytes) {
            *to = f16::from_bits(u16::from(*from) << 8).widen();
        }
    }

    /// Rounds the numbers to `T` and widens them again.
    fn round_trip<T>(numbers: &mut [f32], _narrow: T) {
        let (blocks, rest) = numbers.as_chunks_mut::<16>();
        for block in blocks {
            T::round_trip_block(block);
        }
        for number in rest {
            *number = T::round(*number).widen();
        }
    }

    fn narrow<T>(from: &[f32], to: &mut [MaybeUninit<T>]) {
        let ((blocks, rest), (to_blocks, to_rest)) = (from.as_chunks::<16>(), to.as_chunks_mut::<16>());
        for (to, from) in to_blocks.iter_mut().zip(blocks) {
            T::round_block(from, to);
        }
        for (to, from) in to_rest.iter_mut().zip(rest) {
            to.write(T::round(*from));
        }
    }

    fn q4_0(bytes: &[u8], to: &mut [f32]) {
        for (out, block) in to.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<18>().0) {
            let d = f16_at(block, 0);
            for l in 0..16 {
                out[l] = d * (i32::from(block[2 + l] & 15) - 8) as f32;
                out[l + 16] = d * (i32::from(block[2 + l] >> 4) - 8) as f32;
            }
        }
    }

    fn q4_1(bytes: &[u8], to: &mut [f32]) {
        for (out, block) in to.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<20>().0) {
            let (d, m) = (f16_at(block, 0), f16_at(block, 2));
            for l in 0..16 {
                out[l] = d * f32::from(block[4 + l] & 15) + m;
                out[l + 16] = d * f32::from(block[4 + l] >> 4) + m;
            }
        }
    }

    fn q5_0(bytes: &[u8], to: &mut [f32]) {
        for (out, block) in to.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<22>().0) {
            let d = f16_at(block, 0);
            let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
            for l in 0..16 {
                let (first, second) = ((high >> l) & 1, (high >> (l + 16)) & 1);
                out[l] = d * ((u32::from(block[6 + l] & 15) | (first << 4)) as i32 - 16) as f32;
                out[l + 16] = d * ((u32::from(block[6 + l] >> 4) | (second << 4)) as i32 - 16) as f32;
            }
        }
    }

    fn q5_1(bytes: &[u8], to: &mut [f32]) {
        for (out, block) in to.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<24>().0) {
            let (d, m) = (f16_at(block, 0), f16_at(block, 2));
            let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
            for l in 0..16 {
                let (first, second) = ((high >> l) & 1, (high >> (l + 16)) & 1);
                out[l] = d * (u32::from(block[8 + l] & 15) | (first << 4)) as i32 as f32 + m;
                out[l + 16] = d * (u32::from(block[8 + l] >> 4) | (second << 4)) as i32 as f32 + m;
            }
        }
    }

    fn q8_0(bytes: &[u8], to: &mut [f32]) {
        for (out, block) in to.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<34>().0) {
            let d = f16_at(block, 0);
            for l in 0..32 {
                out[l] = d * f32::from(block[2 + l] as i8);
            }
        }
    }

    /// 16 bytes of scales and minima, a nibble each; 64 bytes of four numbers each; d; d of the minima.
    fn q2k(bytes: &[u8], first: usize, to: &mut [f32]) {
        parts!(bytes, first, to, 84, |block, part, out| {
            let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
            let (bits, shift) = (&block[16 + part / 4 * 32..][..32], part % 4 * 2);
            for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let scale = block[2 * part + half];
                let (scale, min) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
                for l in 0..16 {
                    out[l] = scale * f32::from((bits[16 * half + l] >> shift) & 3) - min;
                }
            }
        });
    }

    /// 32 bytes of third bits, 64 bytes of four numbers each, 12 bytes of 16 scales of six bits, d.
    fn q3k(bytes: &[u8], first: usize, to: &mut [f32]) {
        parts!(bytes, first, to, 110, |block, part, out| {
            let d = f16_at(block, 108);
            let (bits, shift) = (&block[32 + part / 4 * 32..][..32], part % 4 * 2);
            for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let j = 2 * part + half;
                let low = (block[96 + j % 8] >> (j / 8 * 4)) & 15;
                let high = (block[104 + j % 4] >> (j / 4 * 2)) & 3;
                let scale = d * f32::from((low | (high << 4)) as i8 - 32);
                for l in 0..16 {
                    let two = i32::from((bits[16 * half + l] >> shift) & 3);
                    let third = i32::from((block[16 * half + l] >> part) & 1);
                    out[l] = scale * (two - 4 * (1 - third)) as f32;
                }
            }
        });
    }

    /// d, d of the minima, 12 bytes of scales and minima, 128 bytes of nibbles.
    fn q4k(bytes: &[u8], first: usize, to: &mut [f32]) {
        parts!(bytes, first, to, 144, |block, part, out| {
            let (scale, min) = scale_and_min(&block[4..16], part);
            let (scale, min) = (f16_at(block, 0) * scale, f16_at(block, 2) * min);
            let (nibbles, shift) = (&block[16 + part / 2 * 32..][..32], part % 2 * 4);
            for l in 0..32 {
                out[l] = scale * f32::from((nibbles[l] >> shift) & 15) - min;
            }
        });
    }

    /// The layout of Q4_K with 32 bytes of fifth bits before the nibbles.
    fn q5k(bytes: &[u8], first: usize, to: &mut [f32]) {
        parts!(bytes, first, to, 176, |block, part, out| {
            let (scale, min) = scale_and_min(&block[4..16], part);
            let (scale, min) = (f16_at(block, 0) * scale, f16_at(block, 2) * min);
            let (fifths, nibbles, shift) = (&block[16..48], &block[48 + part / 2 * 32..][..32], part % 2 * 4);
            for l in 0..32 {
                let number = ((nibbles[l] >> shift) & 15) | (((fifths[l] >> part) & 1) << 4);
                out[l] = scale * f32::from(number) - min;
            }
        });
    }

    /// 128 bytes of nibbles, 64 bytes of four pairs of bits each, 16 scales of a byte, d.
    fn q6k(bytes: &[u8], first: usize, to: &mut [f32]) {
        parts!(bytes, first, to, 210, |block, part, out| {
            let d = f16_at(block, 208);
            let (half, quarter) = (part / 4, part % 4);
            let nibbles = &block[64 * half + quarter % 2 * 32..][..32];
            let pairs = &block[128 + 32 * half..][..32];
            for l in 0..32 {
                let low = (nibbles[l] >> (quarter / 2 * 4)) & 15;
                let number = i32::from(low | (((pairs[l] >> (2 * quarter)) & 3) << 4)) - 32;
                let scale = block[192 + 8 * half + 2 * quarter + l / 16] as i8;
                out[l] = d * f32::from(scale) * number as f32;
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    #![expect(unsafe_code, reason = "vector instructions on pointers")]

    use std::arch::x86_64::{
        __m512bh, __m512i, _mm256_loadu_si256, _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_storeu_si512,
    };
    use std::mem::{MaybeUninit, transmute};

    use half::bf16;

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn f16_to_bf16(from: &[[u8; 64]], to: &mut [[MaybeUninit<bf16>; 32]]) {
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: 64 bytes are read and 64 written; any bits are f16 and bf16.
            unsafe {
                let half = |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().add(at).cast()));
                let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(half(32), half(0)));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), both);
            }
        }
    }
}
