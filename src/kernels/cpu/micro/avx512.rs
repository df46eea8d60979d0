//! Micro-kernels for AVX-512: 14 rows by two registers of sums. f32 uses fused multiply-add, bf16 `vdpbf16ps`, which sums
//! pairs, and bytes `vpdpbusd` of VNNI, which sums fours.
#![expect(unsafe_code, reason = "vector instructions on pointers")]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_epi32, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_storeu_ps, _mm512_storeu_si512,
};
use std::mem::transmute;

use crate::kernels::cpu::micro::tile::{A_STRIDE, PANEL, TileCall, by_rows};

/// # Safety
/// The operands are as [`TileCall`] says; the processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn f32(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, f32_rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
}

/// # Safety
/// The operands are as [`TileCall`] says; the processor has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn bf16(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, bf16_rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
}

/// `call.a` is unsigned bytes, `call.b` `[depth/4, 32, 4]` signed ones, `call.c` i32.
///
/// # Safety
/// The operands are as [`TileCall`] says; the processor has AVX-512 F and VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) unsafe fn int8(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, int8_rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn int8_rows<const R: usize>(call: &TileCall) {
    // SAFETY: the panel has `depth / 4` lines of 32 fours, each row of `a` `depth / 4` fours, `c` `R` rows of 32 sums.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); 2]; R];
        let (mut a, mut b) = (call.a, call.b);
        for _ in 0..call.depth / 4 {
            let (low, high) = (_mm512_loadu_si512(b.cast()), _mm512_loadu_si512(b.add(64).cast()));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(a.add(r * A_STRIDE).cast::<i32>().read_unaligned());
                sums[0] = _mm512_dpbusd_epi32(sums[0], x, low);
                sums[1] = _mm512_dpbusd_epi32(sums[1], x, high);
            }
            a = a.add(4);
            b = b.add(4 * PANEL);
        }
        for (r, halves) in sums.into_iter().enumerate() {
            for (half, sum) in halves.into_iter().enumerate() {
                let c = call.c.add(r * PANEL + 16 * half).cast::<__m512i>();
                let sum = if call.add { _mm512_add_epi32(_mm512_loadu_si512(c), sum) } else { sum };
                _mm512_storeu_si512(c, sum);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn f32_rows<const R: usize>(call: &TileCall) {
    // SAFETY: the panel has `depth` lines of 32 numbers, each row of `a` `depth` numbers.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b) = (call.a, call.b.cast::<f32>());
        for _ in 0..call.depth {
            let (low, high) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(a.add(r * A_STRIDE).cast::<f32>().read());
                sums[0] = _mm512_fmadd_ps(x, low, sums[0]);
                sums[1] = _mm512_fmadd_ps(x, high, sums[1]);
            }
            a = a.add(4);
            b = b.add(PANEL);
        }
        store(call, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_rows<const R: usize>(call: &TileCall) {
    // SAFETY: the panel has `depth / 2` lines of 32 pairs, each row of `a` `depth / 2` pairs; any bits are a pair.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b) = (call.a, call.b);
        for _ in 0..call.depth / 2 {
            let (low, high) = (pairs(_mm512_loadu_si512(b.cast())), pairs(_mm512_loadu_si512(b.add(64).cast())));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = pairs(_mm512_set1_epi32(a.add(r * A_STRIDE).cast::<i32>().read_unaligned()));
                sums[0] = _mm512_dpbf16_ps(sums[0], x, low);
                sums[1] = _mm512_dpbf16_ps(sums[1], x, high);
            }
            a = a.add(4);
            b = b.add(4 * PANEL);
        }
        store(call, sums);
    }
}

/// The same bits as pairs of bf16.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes, and any bits are valid.
    unsafe { transmute::<__m512i, __m512bh>(bits) }
}

#[target_feature(enable = "avx512f")]
unsafe fn store<const R: usize>(call: &TileCall, sums: [[__m512; 2]; R]) {
    // SAFETY: `c` has `R` rows of 32 numbers.
    unsafe {
        for (r, halves) in sums.into_iter().enumerate() {
            for (half, sum) in halves.into_iter().enumerate() {
                let c = call.c.add(r * PANEL + 16 * half);
                _mm512_storeu_ps(c, if call.add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum });
            }
        }
    }
}
