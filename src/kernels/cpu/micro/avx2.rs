//! AVX2 with FMA: six rows by two registers of sums, twice the half of a panel.
#![expect(unsafe_code, reason = "vector instructions on pointers")]

use std::arch::x86_64::{
    _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::{A_STRIDE, Call, PANEL, by_rows};

/// # Safety
/// As [`Call`] says; AVX2 and FMA are there.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn f32(call: &Call) {
    // SAFETY: handed on.
    unsafe { by_rows!(call, f32_rows: 1 2 3 4 5 6) }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn f32_rows<const R: usize>(call: &Call) {
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
