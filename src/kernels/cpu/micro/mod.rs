//! Micro-kernels: the sums of one tile, a few rows times one panel of 32 outputs, one for each instruction set. All of
//! them read the same blocks of rows and the same packed panels, so that the set can be chosen at run time.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

use crate::kernels::cpu::simd::{Level, level};

/// Outputs of a panel of weights.
pub(crate) const PANEL: usize = 32;
/// Bytes of a row that one call sums over, at most.
pub(crate) const A_BYTES: usize = 1024;
/// Bytes between rows of a block of left operands. Fixed, so that a row is a displacement; an odd number of cache
/// lines, so that the rows of a tile lie in different sets.
pub(crate) const A_STRIDE: usize = A_BYTES + 64;

/// One tile. Nothing in it overlaps.
pub(crate) struct Call {
    /// `rows` rows, [`A_STRIDE`] apart, each of `depth` numbers.
    pub(crate) a: *const u8,
    /// The panel from the first number of the depth on: f32 `[depth, 32]`, bf16 `[depth/2, 32, 2]`, i8
    /// `[depth/4, 32, 4]`.
    pub(crate) b: *const u8,
    /// A multiple of the micro-kernel's grain; a row of `a` takes at most [`A_BYTES`].
    pub(crate) depth: usize,
    /// `[rows, 32]`: f32, or i32 for i8. There is memory for as many rows as the micro-kernel takes at once.
    pub(crate) c: *mut f32,
    pub(crate) rows: usize,
    /// Add to what is in `c`, which is not read otherwise.
    pub(crate) add: bool,
}

/// What a micro-kernel multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operands {
    F32,
    Bf16,
    /// Signed bytes.
    I8,
    /// On the left signed bytes with 128 added, on the right signed ones: the sums are too great by 128 times the sums
    /// of the weights.
    U8,
}

impl Operands {
    pub(crate) const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// Every byte of a zero on the left.
    pub(crate) const fn zero(self) -> u8 {
        if matches!(self, Self::U8) { 128 } else { 0 }
    }
}

/// What prepares a thread, and what undoes it.
type Around = (unsafe fn(), unsafe fn());

/// A micro-kernel and what it wants.
#[derive(Clone, Copy)]
pub(crate) struct Micro {
    pub(crate) operands: Operands,
    /// Rows that it takes at once.
    pub(crate) rows: usize,
    /// The depth is a multiple of it.
    pub(crate) grain: usize,
    run: unsafe fn(&Call),
    /// Called on a thread before its first tile and after its last.
    around: Option<Around>,
}

impl Micro {
    /// That of the level in use: for bf16 operands where there is one that gains by them, for f32 otherwise.
    pub(crate) fn new(narrow: bool) -> Self {
        Self::of(level(), narrow)
    }

    /// That of the level in use for bytes, where the sums in `c` are i32. VNNI is no level of its own: processors with
    /// AVX-512 have it from 2019 on.
    pub(crate) fn int8() -> Self {
        #[cfg(target_arch = "x86_64")]
        match level() {
            Level::Amx => {
                let around = Some((amx::enter as unsafe fn(), amx::leave as unsafe fn()));
                return Self { operands: Operands::I8, rows: 32, grain: 64, run: amx::int8, around };
            }
            Level::Avx512 | Level::Avx512Bf16 if std::arch::is_x86_feature_detected!("avx512vnni") => {
                return Self { operands: Operands::U8, rows: 14, grain: 4, run: avx512::int8, around: None };
            }
            Level::Avx512 | Level::Avx512Bf16 | Level::Avx2 => {
                return Self { operands: Operands::I8, rows: 4, grain: 4, run: avx2::int8, around: None };
            }
            Level::Portable => {}
        }
        Self { operands: Operands::I8, rows: 4, grain: 4, run: portable::int8, around: None }
    }

    #[cfg(target_arch = "x86_64")]
    fn of(level: Level, narrow: bool) -> Self {
        match (level, narrow) {
            (Level::Amx, true) => Self {
                operands: Operands::Bf16,
                rows: 32,
                grain: 32,
                run: amx::bf16,
                around: Some((amx::enter, amx::leave)),
            },
            (Level::Avx512Bf16, true) => {
                Self { operands: Operands::Bf16, rows: 14, grain: 2, run: avx512::bf16, around: None }
            }
            (Level::Avx512 | Level::Avx512Bf16 | Level::Amx, _) => {
                Self { operands: Operands::F32, rows: 14, grain: 1, run: avx512::f32, around: None }
            }
            (Level::Avx2, _) => Self { operands: Operands::F32, rows: 6, grain: 1, run: avx2::f32, around: None },
            (Level::Portable, _) => Self::portable(),
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn of(level: Level, narrow: bool) -> Self {
        Self { operands: Operands::F32, rows: 6, grain: 1, run: neon::f32, around: None }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn of(_: Level, _: bool) -> Self {
        Self::portable()
    }

    fn portable() -> Self {
        Self { operands: Operands::F32, rows: 4, grain: 1, run: portable::f32, around: None }
    }

    /// Runs `work`, within which [`Self::run`] may be called on this thread.
    #[expect(unsafe_code, reason = "tile registers are set up and given back")]
    pub(crate) fn within<R>(&self, work: impl FnOnce() -> R) -> R {
        struct Leave(Option<unsafe fn()>);
        impl Drop for Leave {
            fn drop(&mut self) {
                if let Some(leave) = self.0 {
                    // SAFETY: `enter` ran on this thread before.
                    unsafe { leave() }
                }
            }
        }
        if let Some((enter, _)) = self.around {
            // SAFETY: this micro-kernel is only chosen where its instructions are there.
            unsafe { enter() }
        }
        let _leave = Leave(self.around.map(|(_, leave)| leave));
        work()
    }

    /// # Safety
    /// The operands are as [`Call`] says, with `rows` at most `self.rows` and `depth` a multiple of `self.grain`; the
    /// caller is within [`Self::within`].
    #[expect(unsafe_code, reason = "operands are pointers")]
    pub(crate) unsafe fn run(&self, call: &Call) {
        // SAFETY: as above; the instruction set was detected before the level was chosen.
        unsafe { (self.run)(call) }
    }
}

/// Asks for memory to be brought to the second cache. Any address may be asked for.
#[inline]
pub(crate) fn prefetch(at: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        #[expect(unsafe_code, reason = "a hint to the processor")]
        // SAFETY: a prefetch never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
}

/// Calls `$rows::<R>` for the number of rows of `$call`, which is one of those listed.
macro_rules! by_rows {
    ($call:ident, $rows:ident: $($count:literal)*) => {
        match $call.rows {
            $($count => $rows::<$count>($call),)*
            _ => {}
        }
    };
}
use by_rows;
