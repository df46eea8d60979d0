//! Transposes lines of numbers into panels: `[lines, words]` becomes `[words, 32]`.

use std::mem::MaybeUninit;

#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::aligned::CACHE_LINE;
use crate::kernels::cpu::element::{Element, as_bytes};
use crate::kernels::cpu::micro::tile::PANEL;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd;

/// Bytes of a word, the unit that is moved: a pair of 16-bit numbers or one f32.
pub(crate) const WORD: usize = 4;
/// Words of a line that are transposed at once: a cache line.
pub(crate) const BLOCK: usize = 16;

/// `count` lines of `length` bytes, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) count: usize,
    pub(crate) length: usize,
}

impl<'a> Lines<'a> {
    /// `count` lines of `length` numbers, `stride` numbers apart.
    pub(crate) fn of<T: Element>(numbers: &'a [T], stride: usize, count: usize, length: usize) -> Self {
        let size = size_of::<T>();
        Self { bytes: as_bytes(numbers), stride: stride * size, count, length: length * size }
    }
}

/// Writes `[words, 32]`: word `w` of line `n` goes to `w · 32 + n`, zeros where there is no such line or word. `to` holds 16
/// words of each line more, whose contents are unspecified afterwards.
pub(crate) fn transpose_words(from: Lines, words: usize, to: &mut [MaybeUninit<u32>]) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() >= simd::SimdLevel::Avx512 {
        let last = (from.count.saturating_sub(1)) * from.stride + from.length;
        assert!(from.count == 0 || last <= from.bytes.len(), "lines beyond the weights");
        #[expect(unsafe_code, reason = "vector instructions")]
        // SAFETY: the lines are within `from.bytes`, as was just checked; the level has these instructions.
        unsafe {
            return avx512::transpose_words(from, words, to);
        }
    }
    let whole = from.length / WORD;
    to[..words * PANEL].fill(MaybeUninit::new(0));
    for n in 0..from.count {
        let line = &from.bytes[n * from.stride..][..from.length];
        let (words, rest) = line.as_chunks::<WORD>();
        for (to, word) in to[n..].iter_mut().step_by(PANEL).zip(words) {
            to.write(u32::from_ne_bytes(*word));
        }
        if let [a, b, ..] = *rest {
            to[whole * PANEL + n].write(u32::from_ne_bytes([a, b, 0, 0]));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! Squares of 16 × 16 words, transposed in registers.
    #![expect(unsafe_code, reason = "vector instructions on pointers")]

    use std::arch::x86_64::{
        __m512i, __mmask32, _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    use std::mem::MaybeUninit;

    use super::{BLOCK, CACHE_LINE, Lines, PANEL, WORD};

    /// # Safety
    /// The lines lie within their bytes; the processor has AVX-512 F and BW.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) unsafe fn transpose_words(from: Lines, words: usize, to: &mut [MaybeUninit<u32>]) {
        // The lines often share one offset within a cache line. A short first block aligns the others to cache lines, so
        // that none is read twice: lines a power of two apart share so few cache sets that none stays in the first cache.
        let offset = from.bytes.as_ptr().addr() % CACHE_LINE;
        let first = if offset.is_multiple_of(WORD) { CACHE_LINE - offset } else { CACHE_LINE };
        let mut word = 0;
        while word < words {
            let length = if word == 0 { first } else { CACHE_LINE };
            let to = &mut to[word * PANEL..][..BLOCK * PANEL];
            let left = from.length.saturating_sub(word * WORD).min(length);
            for half in 0..PANEL / BLOCK {
                let to = &mut to[half * BLOCK..];
                let start = from.bytes.as_ptr().wrapping_add(half * BLOCK * from.stride + word * WORD);
                let count = from.count.saturating_sub(half * BLOCK).min(BLOCK);
                // SAFETY: the lines exist and have a block's words; masked words are not read.
                unsafe {
                    if count == BLOCK && left == CACHE_LINE {
                        square(|n| _mm512_loadu_si512(start.wrapping_add(n * from.stride).cast()), to);
                    } else {
                        let mask = ((1_u64 << (left / 2)) - 1) as __mmask32;
                        let line = |n| _mm512_maskz_loadu_epi16(mask, start.wrapping_add(n * from.stride).cast());
                        square(|n| if n < count { line(n) } else { _mm512_setzero_si512() }, to);
                    }
                }
            }
            word += length / WORD;
        }
    }

    /// Writes word `w` of line `n` to `w · 32 + n`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn square(line: impl Fn(usize) -> __m512i, to: &mut [MaybeUninit<u32>]) {
        // Lane `l` of `fours[4g + c]` is word `4l + c` of lines `4g` to `4g + 3`.
        let mut fours = [_mm512_setzero_si512(); BLOCK];
        for (group, four) in fours.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (a, b) = (line(4 * group), line(4 * group + 1));
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (c, d) = (line(4 * group + 2), line(4 * group + 3));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            *four = [
                _mm512_unpacklo_epi64(ab_low, cd_low),
                _mm512_unpackhi_epi64(ab_low, cd_low),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ];
        }
        let mut put = |word: usize, column: __m512i| {
            let to = to[word * PANEL..][..BLOCK].as_mut_ptr();
            // SAFETY: the slice has 16 words.
            unsafe { _mm512_storeu_si512(to.cast(), column) };
        };
        for c in 0..4 {
            let lines = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            // Even lanes, then odd ones.
            let low = _mm512_shuffle_i32x4::<0x88>(lines[0], lines[1]);
            let high = _mm512_shuffle_i32x4::<0x88>(lines[2], lines[3]);
            put(c, _mm512_shuffle_i32x4::<0x88>(low, high));
            put(8 + c, _mm512_shuffle_i32x4::<0xdd>(low, high));
            let low = _mm512_shuffle_i32x4::<0xdd>(lines[0], lines[1]);
            let high = _mm512_shuffle_i32x4::<0xdd>(lines[2], lines[3]);
            put(4 + c, _mm512_shuffle_i32x4::<0x88>(low, high));
            put(12 + c, _mm512_shuffle_i32x4::<0xdd>(low, high));
        }
    }
}
