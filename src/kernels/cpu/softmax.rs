//! The running softmax of attention: the maximum of a row of scores within a block of keys, and the powers that are the
//! left operand of the product with the values.

use std::marker::PhantomData;

use crate::kernels::cpu::math::exp2;
use crate::kernels::cpu::micro::tile::{Operands, PANEL};
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd;
use crate::kernels::cpu::simd::multiversion;

/// The running softmax of one query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoftmaxState {
    /// The maximum of the scores so far, before they are scaled.
    pub(crate) max: f32,
    /// The sum of the powers so far.
    pub(crate) sum: f32,
}

impl SoftmaxState {
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// One row of scores: lines of 32 numbers, `stride` numbers apart.
#[derive(Clone, Copy)]
pub(crate) struct ScoreRow<'a> {
    start: *const f32,
    stride: usize,
    scores: PhantomData<&'a [f32]>,
}

impl<'a> ScoreRow<'a> {
    /// The row that begins with the first number of `scores`.
    ///
    /// # Safety
    /// Every line that [`Self::line`] is called for lies within `scores`.
    #[expect(unsafe_code, reason = "lines are read without a check of their bounds")]
    pub(crate) unsafe fn new(scores: &'a [f32], stride: usize) -> Self {
        Self { start: scores.as_ptr(), stride, scores: PhantomData }
    }

    #[expect(unsafe_code, reason = "lines are read without a check of their bounds")]
    #[inline(always)]
    pub(crate) fn line(self, line: usize) -> &'a [f32; PANEL] {
        // SAFETY: the caller of `new` promises that the line lies within the scores.
        unsafe { &*self.start.wrapping_add(line * self.stride).cast::<[f32; PANEL]>() }
    }
}

/// One row of scores of a block of keys.
pub(crate) struct SoftmaxRow<'a> {
    pub(crate) scores: ScoreRow<'a>,
    /// Keys that the query may see; the powers of the others are 0.
    pub(crate) visible: usize,
    /// Powers to write: `visible`, rounded up to a multiple of 32.
    pub(crate) keys: usize,
    /// Scales the scores to exponents of 2.
    pub(crate) factor: f32,
    /// The format of the powers: f32 or bf16.
    pub(crate) operands: Operands,
}

impl SoftmaxRow<'_> {
    /// The maximum of `before` and the visible scores. NaN is ignored.
    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "functions compiled for more than the baseline"))]
    pub(crate) fn max(&self, before: f32) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if simd::level() >= simd::SimdLevel::Avx512 {
            // SAFETY: the level has AVX-512 F.
            return unsafe { avx512::max(self, before) };
        }
        max_score(self.scores, self.visible, before)
    }

    /// Writes `2^((score - max) · factor)` to `to` and returns the sum.
    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "functions compiled for more than the baseline"))]
    pub(crate) fn powers(&self, max: f32, to: &mut [f32]) -> f32 {
        let to = &mut to[..self.keys * self.operands.size() / size_of::<f32>()];
        #[cfg(target_arch = "x86_64")]
        if simd::level() >= simd::SimdLevel::Avx512 {
            // SAFETY: `to` holds `keys` operands; the level has these features, as bf16 operands are chosen only with
            // AVX-512 BF16.
            return unsafe {
                match self.operands {
                    Operands::Bf16 => avx512::powers_bf16(self, max, to.as_mut_ptr().cast()),
                    _ => avx512::powers(self, max, to.as_mut_ptr().cast()),
                }
            };
        }
        powers(self.scores, self.visible, self.factor, max, to)
    }
}

/// Reduces 32 numbers to one, halves at a time.
#[inline(always)]
fn fold(lanes: [f32; 32], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    for half in [16, 8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low = join(*low, *high);
        }
    }
    lanes[0]
}

multiversion! {
    /// The maximum of `before` and the first `visible` scores. NaN is ignored.
    fn max_score(scores: ScoreRow, visible: usize, before: f32) -> f32 {
        let mut lanes = [before; 32];
        for line in 0..visible.div_ceil(32) {
            let from = scores.line(line);
            if (line + 1) * 32 <= visible {
                for (lane, value) in lanes.iter_mut().zip(from) {
                    *lane = if *value > *lane { *value } else { *lane };
                }
            } else {
                for (lane, value) in lanes.iter_mut().zip(&from[..visible - line * 32]) {
                    *lane = if *value > *lane { *value } else { *lane };
                }
            }
        }
        fold(lanes, |a, b| if b > a { b } else { a })
    }

    /// Writes `2^((x - max) · factor)` for each of the first `visible` scores `x` and 0 for the rest, and returns the sum.
    fn powers(scores: ScoreRow, visible: usize, factor: f32, max: f32, to: &mut [f32]) -> f32 {
        let shift = max * factor;
        let mut lanes = [0.0_f32; 32];
        for (line, to) in to.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (to, x) in to.iter_mut().zip(scores.line(line)) {
                *to = exp2(*x * factor - shift);
            }
            if (line + 1) * 32 > visible {
                to[visible.saturating_sub(line * 32)..].fill(0.0);
            }
            for (lane, x) in lanes.iter_mut().zip(to) {
                *lane += *x;
            }
        }
        fold(lanes, |a, b| a + b)
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

    use super::{PANEL, SoftmaxRow};

    const WIDTH: usize = 16;

    /// The lanes from number `at` on that are below `visible`.
    #[inline(always)]
    fn mask(at: usize, visible: usize) -> u16 {
        match visible.saturating_sub(at) {
            WIDTH.. => u16::MAX,
            few => (1 << few) - 1,
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn max(row: &SoftmaxRow, before: f32) -> f32 {
        let mut maxima = [_mm512_set1_ps(before); 2];
        for line in 0..row.visible.div_ceil(PANEL) {
            let scores = row.scores.line(line);
            for (half, max) in maxima.iter_mut().enumerate() {
                let at = half * WIDTH;
                // SAFETY: a line has 32 numbers. If one operand is NaN, `max` returns the second.
                unsafe {
                    let x = _mm512_loadu_ps(scores.as_ptr().add(at));
                    *max = _mm512_mask_max_ps(*max, mask(line * PANEL + at, row.visible), x, *max);
                }
            }
        }
        let [low, high] = maxima.map(|max| _mm512_reduce_max_ps(max));
        low.max(high)
    }

    /// `2^x` by the series of `e^(r ln 2)` within half of 0, times a power of two.
    #[target_feature(enable = "avx512f")]
    fn exp2(x: __m512) -> __m512 {
        const TERMS: [f32; 7] =
            [1.0, 6.931_472e-1, 2.402_265e-1, 5.550_411e-2, 9.618_129e-3, 1.333_355_8e-3, 1.540_353e-4];
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm512_sub_ps(x, n);
        _mm512_scalef_ps(polynomial(TERMS, r), n)
    }

    /// `2^x` for `x` up to 0, to 3e-6, far below the precision of bf16.
    #[target_feature(enable = "avx512f")]
    fn exp2_bf16(x: __m512) -> __m512 {
        /// Minimax coefficients within half of 0.
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
            pub(crate) unsafe fn $name(row: &SoftmaxRow, max: f32, to: *mut u8) -> f32 {
                let (factor, shift) = (_mm512_set1_ps(row.factor), _mm512_set1_ps(max * row.factor));
                let mut sums = [_mm512_setzero_ps(); 2];
                for line in 0..row.keys / PANEL {
                    let scores = row.scores.line(line);
                    for (half, sum) in sums.iter_mut().enumerate() {
                        let at = half * WIDTH;
                        // SAFETY: a line has 32 numbers, and `to` has memory for `keys` operands.
                        unsafe {
                            let x = _mm512_fmsub_ps(_mm512_loadu_ps(scores.as_ptr().add(at)), factor, shift);
                            let at = line * PANEL + at;
                            let y = _mm512_maskz_mov_ps(mask(at, row.visible), $exp2(x));
                            *sum = _mm512_add_ps(*sum, y);
                            $store(to, at, y);
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
