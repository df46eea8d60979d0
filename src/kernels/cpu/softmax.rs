//! The softmax of one row of scores within a block of keys: its greatest number, and powers that stand as the left operand
//! of the product with the values.

use crate::kernels::cpu::attention::Scores;
use crate::kernels::cpu::micro::{Operands, PANEL};
use crate::kernels::cpu::simd;

/// One row of scores and where its powers go.
pub(crate) struct Row {
    /// Scores of 32 keys each.
    pub(crate) scores: Scores,
    /// Keys that the query may see; the powers of those behind are 0.
    pub(crate) seen: usize,
    /// Powers to write: `seen`, filled up to a multiple of 32.
    pub(crate) keys: usize,
    /// Of the scores before they become exponents of 2.
    pub(crate) factor: f32,
    pub(crate) operands: Operands,
    pub(crate) to: *mut u8,
}

impl Row {
    /// The greatest of `before` and the scores seen; NaN is passed over.
    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "functions compiled for more than the baseline"))]
    pub(crate) fn greatest(&self, before: f32) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if simd::level() >= simd::Level::Avx512 {
            // SAFETY: the level says that AVX-512 F is here.
            return unsafe { avx512::greatest(self, before) };
        }
        simd::greatest_of(self.scores, self.seen, before)
    }

    /// Writes `2^((score - greatest) · factor)` and gives the sum.
    ///
    /// # Safety
    /// There is memory for `keys` operands at `to`, which nothing else uses.
    #[expect(unsafe_code, reason = "a row of a block seen as numbers")]
    pub(crate) unsafe fn powers(&self, greatest: f32) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if simd::level() >= simd::Level::Avx512 {
            // SAFETY: the level says which features are here; bf16 operands are chosen with AVX-512 BF16 alone.
            return unsafe {
                match self.operands {
                    Operands::Bf16 => avx512::powers_bf16(self, greatest),
                    _ => avx512::powers(self, greatest),
                }
            };
        }
        // SAFETY: that of the caller.
        let to = unsafe { std::slice::from_raw_parts_mut(self.to.cast::<f32>(), self.keys) };
        simd::powers(self.scores, self.seen, self.factor, greatest, to)
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions on pointers")]
mod avx512 {
    use std::arch::x86_64::{
        __m256bh, __m256i, __m512, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm256_storeu_si256, _mm512_add_ps,
        _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_loadu_ps, _mm512_mask_max_ps, _mm512_maskz_mov_ps,
        _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_storeu_ps, _mm512_sub_ps,
    };

    use super::{PANEL, Row};

    const WIDTH: usize = 16;

    /// Lanes from number `at` on that lie before `seen`.
    #[inline(always)]
    fn mask(at: usize, seen: usize) -> u16 {
        match seen.saturating_sub(at) {
            WIDTH.. => u16::MAX,
            few => (1 << few) - 1,
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn greatest(row: &Row, before: f32) -> f32 {
        let mut most = [_mm512_set1_ps(before); 2];
        for line in 0..row.seen.div_ceil(PANEL) {
            let scores = row.scores.at(line);
            for (half, most) in most.iter_mut().enumerate() {
                let at = half * WIDTH;
                // SAFETY: a line has 32 numbers. Of a NaN and a number, `max` gives its second operand.
                unsafe {
                    let x = _mm512_loadu_ps(scores.as_ptr().add(at));
                    *most = _mm512_mask_max_ps(*most, mask(line * PANEL + at, row.seen), x, *most);
                }
            }
        }
        let [low, high] = most.map(|most| _mm512_reduce_max_ps(most));
        low.max(high)
    }

    /// `2^x` by the series of `e^(r ln 2)` within half of 0, scaled.
    #[target_feature(enable = "avx512f")]
    fn exp2(x: __m512) -> __m512 {
        const TERMS: [f32; 7] =
            [1.0, 6.931_472e-1, 2.402_265e-1, 5.550_411e-2, 9.618_129e-3, 1.333_355_8e-3, 1.540_353e-4];
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm512_sub_ps(x, n);
        _mm512_scalef_ps(polynomial(TERMS, r), n)
    }

    /// `2^x` for `x` of at most 0, right to 3e-6, far less than bf16 tells apart.
    #[target_feature(enable = "avx512f")]
    fn exp2_bf16(x: __m512) -> __m512 {
        /// Of the least relative error within half of 0.
        const TERMS: [f32; 5] = [9.999_993e-1, 6.931_218e-1, 2.402_474_4e-1, 5.591_786e-2, 9.570_102e-3];
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        _mm512_scalef_ps(polynomial(TERMS, _mm512_sub_ps(x, n)), n)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn polynomial<const N: usize>(terms: [f32; N], r: __m512) -> __m512 {
        let mut p = _mm512_set1_ps(terms[N - 1]);
        for term in terms[..N - 1].iter().rev() {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*term));
        }
        p
    }

    macro_rules! powers {
        ($name:ident, $features:literal, $exp2:ident, $store:expr) => {
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn $name(row: &Row, greatest: f32) -> f32 {
                let (factor, shift) = (_mm512_set1_ps(row.factor), _mm512_set1_ps(greatest * row.factor));
                let mut sums = [_mm512_setzero_ps(); 2];
                for line in 0..row.keys / PANEL {
                    let scores = row.scores.at(line);
                    for (half, sum) in sums.iter_mut().enumerate() {
                        let at = half * WIDTH;
                        // SAFETY: a line has 32 numbers, and there is memory for `keys` operands.
                        unsafe {
                            let x = _mm512_fmsub_ps(_mm512_loadu_ps(scores.as_ptr().add(at)), factor, shift);
                            let at = line * PANEL + at;
                            let y = _mm512_maskz_mov_ps(mask(at, row.seen), $exp2(x));
                            *sum = _mm512_add_ps(*sum, y);
                            $store(row.to, at, y);
                        }
                    }
                }
                _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
            }
        };
    }

    powers!(powers, "avx512f", exp2, |to: *mut u8, at: usize, y| _mm512_storeu_ps(to.cast::<f32>().add(at), y));
    powers!(powers_bf16, "avx512f,avx512vl,avx512bf16", exp2_bf16, |to: *mut u8, at: usize, y| {
        let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(y));
        _mm256_storeu_si256(to.add(2 * at).cast(), narrow);
    });
}
