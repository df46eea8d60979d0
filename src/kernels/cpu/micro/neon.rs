//! The micro-kernel for NEON: six rows by four registers of sums for each half of a panel.
#![expect(unsafe_code, reason = "vector instructions on pointers")]

use std::arch::aarch64::{vaddq_f32, vdupq_n_f32, vfmaq_n_f32, vld1q_f32, vst1q_f32};

use crate::kernels::cpu::micro::tile::{A_STRIDE, PANEL, TileCall, by_rows};

/// # Safety
/// The operands are as [`TileCall`] says.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn f32(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, f32_rows: 1 2 3 4 5 6) }
}

#[target_feature(enable = "neon")]
unsafe fn f32_rows<const R: usize>(call: &TileCall) {
    // SAFETY: the panel has `depth` lines of 32 numbers, each row of `a` `depth` numbers, `c` `R` rows of 32.
    unsafe {
        for half in [0, PANEL / 2] {
            let mut sums = [[vdupq_n_f32(0.0); 4]; R];
            let (mut a, mut b) = (call.a, call.b.cast::<f32>().add(half));
            for _ in 0..call.depth {
                let lines = [vld1q_f32(b), vld1q_f32(b.add(4)), vld1q_f32(b.add(8)), vld1q_f32(b.add(12))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = a.add(r * A_STRIDE).cast::<f32>().read();
                    for (sum, line) in sums.iter_mut().zip(lines) {
                        *sum = vfmaq_n_f32(*sum, line, x);
                    }
                }
                a = a.add(4);
                b = b.add(PANEL);
            }
            for (r, quarters) in sums.into_iter().enumerate() {
                for (quarter, sum) in quarters.into_iter().enumerate() {
                    let c = call.c.add(r * PANEL + half + 4 * quarter);
                    vst1q_f32(c, if call.add { vaddq_f32(vld1q_f32(c), sum) } else { sum });
                }
            }
        }
    }
}
