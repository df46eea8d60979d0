//! Micro-kernels in portable Rust: four rows by eight sums at a time.
#![expect(unsafe_code, reason = "operands are pointers")]

use crate::kernels::cpu::micro::tile::{A_STRIDE, PANEL, TileCall, by_rows};

const WIDTH: usize = 8;

/// # Safety
/// The operands are as [`TileCall`] says.
#[cfg(not(target_arch = "aarch64"))]
pub(crate) unsafe fn f32(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, f32_rows: 1 2 3 4) }
}

#[cfg(not(target_arch = "aarch64"))]
unsafe fn f32_rows<const R: usize>(call: &TileCall) {
    for part in (0..PANEL).step_by(WIDTH) {
        let mut sums = [[0.0_f32; WIDTH]; R];
        for k in 0..call.depth {
            // SAFETY: the panel has `depth` lines of 32 numbers, each row of `a` `depth` numbers.
            let line = unsafe { &*call.b.cast::<f32>().add(k * PANEL + part).cast::<[f32; WIDTH]>() };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                let x = unsafe { call.a.add(r * A_STRIDE).cast::<f32>().add(k).read() };
                for (sum, y) in sums.iter_mut().zip(line) {
                    *sum += x * y;
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: `c` has `R` rows of 32 numbers, which nothing else accesses.
            let c = unsafe { &mut *call.c.add(r * PANEL + part).cast::<[f32; WIDTH]>() };
            for (c, sum) in c.iter_mut().zip(sums) {
                *c = if call.add { *c + sum } else { *sum };
            }
        }
    }
}

/// Signed bytes; `call.b` is `[depth/4, 32, 4]` bytes, `call.c` i32.
///
/// # Safety
/// The operands are as [`TileCall`] says.
pub(crate) unsafe fn int8(call: &TileCall) {
    // SAFETY: the contract is the same.
    unsafe { by_rows!(call, int8_rows: 1 2 3 4) }
}

unsafe fn int8_rows<const R: usize>(call: &TileCall) {
    for part in (0..PANEL).step_by(WIDTH) {
        let mut sums = [[0_i32; WIDTH]; R];
        for k in (0..call.depth).step_by(4) {
            // SAFETY: the panel has `depth / 4` lines of 32 fours, each row of `a` `depth / 4` fours.
            let line = unsafe { &*call.b.add(k * PANEL + part * 4).cast::<[[i8; 4]; WIDTH]>() };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                let x = unsafe { call.a.add(r * A_STRIDE + k).cast::<[i8; 4]>().read() };
                for (sum, y) in sums.iter_mut().zip(line) {
                    for (x, y) in x.iter().zip(y) {
                        *sum += i32::from(*x) * i32::from(*y);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: `c` has `R` rows of 32 sums, which nothing else accesses.
            let c = unsafe { &mut *call.c.add(r * PANEL + part).cast::<[i32; WIDTH]>() };
            for (c, sum) in c.iter_mut().zip(sums) {
                *c = if call.add { c.wrapping_add(*sum) } else { *sum };
            }
        }
    }
}
