//! Micro-kernels for AVX2 with FMA: six rows by two registers of sums for each half of a panel; four rows of bytes.
#![expect(unsafe_code, reason = "vector instructions on pointers")]

use std::arch::x86_64::{
    __m256i, _mm256_abs_epi8, _mm256_add_epi32, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_sign_epi8, _mm256_storeu_ps, _mm256_storeu_si256,
};

use crate::kernels::cpu::micro::tile::{A_STRIDE, PANEL, TileCall, by_rows};

/// # Safety
/// The operands are as [`TileCall`] says; the processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn f32(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, f32_rows: 1 2 3 4 5 6) }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn f32_rows<const R: usize>(call: &TileCall) {
    // SAFETY: the panel has `depth` lines of 32 numbers, each row of `a` `depth` numbers, `c` `R` rows of 32.
    unsafe {
        for half in [0, PANEL / 2] {
            let mut sums = [[_mm256_setzero_ps(); 2]; R];
            let (mut a, mut b) = (call.a, call.b.cast::<f32>().add(half));
            for _ in 0..call.depth {
                let (low, high) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(a.add(r * A_STRIDE).cast::<f32>().read());
                    sums[0] = _mm256_fmadd_ps(x, low, sums[0]);
                    sums[1] = _mm256_fmadd_ps(x, high, sums[1]);
                }
                a = a.add(4);
                b = b.add(PANEL);
            }
            for (r, quarters) in sums.into_iter().enumerate() {
                for (quarter, sum) in quarters.into_iter().enumerate() {
                    let c = call.c.add(r * PANEL + half + 8 * quarter);
                    _mm256_storeu_ps(c, if call.add { _mm256_add_ps(_mm256_loadu_ps(c), sum) } else { sum });
                }
            }
        }
    }
}

/// Signed bytes of at most 127 in magnitude; `call.b` is `[depth/4, 32, 4]` bytes, `call.c` i32.
///
/// # Safety
/// The operands are as [`TileCall`] says; the processor has AVX2.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn int8(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, int8_rows: 1 2 3 4) }
}

#[target_feature(enable = "avx2")]
unsafe fn int8_rows<const R: usize>(call: &TileCall) {
    // SAFETY: the panel has `depth / 4` lines of 32 fours, each row of `a` `depth / 4` fours, `c` `R` rows of 32 sums.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        for half in [0, PANEL / 2] {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            let (mut a, mut b) = (call.a, call.b.add(half * 4));
            for _ in 0..call.depth / 4 {
                let weights = [_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(32).cast())];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(a.add(r * A_STRIDE).cast::<i32>().read_unaligned());
                    let size = _mm256_abs_epi8(x);
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        // |x| · (w with the sign of x): the sum of two such products is at most 32258 and fits 16 bits.
                        let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(weight, x));
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                    }
                }
                a = a.add(4);
                b = b.add(4 * PANEL);
            }
            for (r, quarters) in sums.into_iter().enumerate() {
                for (quarter, sum) in quarters.into_iter().enumerate() {
                    let c = call.c.add(r * PANEL + half + 8 * quarter).cast::<__m256i>();
                    let sum = if call.add { _mm256_add_epi32(_mm256_loadu_si256(c), sum) } else { sum };
                    _mm256_storeu_si256(c, sum);
                }
            }
        }
    }
}
