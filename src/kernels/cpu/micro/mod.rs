//! The choice of micro-kernel: one for each instruction set and operand format. All of them read the same row blocks and
//! the same packed panels, so the instruction set can be chosen at run time.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
pub(crate) mod tile;

use crate::kernels::cpu::micro::tile::{Operands, TileCall};
use crate::kernels::cpu::simd::{SimdLevel, level};

/// A pair of functions that prepare a thread for tiles and restore it.
type ThreadSetup = (unsafe fn(), unsafe fn());

/// A micro-kernel and the tile shape that it needs.
#[derive(Clone, Copy)]
pub(crate) struct MicroKernel {
    pub(crate) operands: Operands,
    /// Rows of a tile.
    pub(crate) rows: usize,
    /// The depth of a call is a multiple of it.
    pub(crate) depth_multiple: usize,
    compute: unsafe fn(&TileCall),
    /// Runs on a thread before its first tile and after its last.
    setup: Option<ThreadSetup>,
}

impl MicroKernel {
    /// The micro-kernel of the level in use. With `bf16` it takes bf16 operands if that is faster than f32 at this level.
    pub(crate) fn new(bf16: bool) -> Self {
        Self::at_level(level(), bf16)
    }

    /// The micro-kernel for bytes of the level in use; its sums in `c` are i32. VNNI is no level of its own: processors
    /// with AVX-512 have it from 2019 on.
    pub(crate) fn int8() -> Self {
        #[cfg(target_arch = "x86_64")]
        match level() {
            SimdLevel::Amx => {
                let setup = Some((amx::enter as unsafe fn(), amx::leave as unsafe fn()));
                return Self { operands: Operands::I8, rows: 32, depth_multiple: 64, compute: amx::int8, setup };
            }
            SimdLevel::Avx512 | SimdLevel::Avx512Bf16 if std::arch::is_x86_feature_detected!("avx512vnni") => {
                return Self::without_setup(Operands::U8, 14, 4, avx512::int8);
            }
            SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx2 => {
                return Self::without_setup(Operands::I8, 4, 4, avx2::int8);
            }
            SimdLevel::Portable => {}
        }
        Self::without_setup(Operands::I8, 4, 4, portable::int8)
    }

    const fn without_setup(
        operands: Operands,
        rows: usize,
        depth_multiple: usize,
        compute: unsafe fn(&TileCall),
    ) -> Self {
        Self { operands, rows, depth_multiple, compute, setup: None }
    }

    #[cfg(target_arch = "x86_64")]
    fn at_level(level: SimdLevel, bf16: bool) -> Self {
        match (level, bf16) {
            (SimdLevel::Amx, true) => {
                let setup = Some((amx::enter as unsafe fn(), amx::leave as unsafe fn()));
                Self { operands: Operands::Bf16, rows: 32, depth_multiple: 32, compute: amx::bf16, setup }
            }
            (SimdLevel::Avx512Bf16, true) => Self::without_setup(Operands::Bf16, 14, 2, avx512::bf16),
            (SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Amx, _) => {
                Self::without_setup(Operands::F32, 14, 1, avx512::f32)
            }
            (SimdLevel::Avx2, _) => Self::without_setup(Operands::F32, 6, 1, avx2::f32),
            (SimdLevel::Portable, _) => Self::portable(),
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn at_level(_: SimdLevel, _: bool) -> Self {
        Self::without_setup(Operands::F32, 6, 1, neon::f32)
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn at_level(_: SimdLevel, _: bool) -> Self {
        Self::portable()
    }

    #[cfg(not(target_arch = "aarch64"))]
    fn portable() -> Self {
        Self::without_setup(Operands::F32, 4, 1, portable::f32)
    }

    /// Runs `work`, in which [`Self::run`] may be called on this thread.
    #[expect(unsafe_code, reason = "tile registers are set up and released")]
    pub(crate) fn on_thread<R>(&self, work: impl FnOnce() -> R) -> R {
        struct Leave(Option<unsafe fn()>);
        impl Drop for Leave {
            fn drop(&mut self) {
                if let Some(leave) = self.0 {
                    // SAFETY: `enter` ran on this thread before.
                    unsafe { leave() }
                }
            }
        }
        if let Some((enter, _)) = self.setup {
            // SAFETY: a micro-kernel is chosen only if the processor has its instructions.
            unsafe { enter() }
        }
        let _leave = Leave(self.setup.map(|(_, leave)| leave));
        work()
    }

    /// # Safety
    /// The operands are as [`TileCall`] says, with `rows` at most `self.rows` and `depth` a multiple of
    /// `self.depth_multiple`; the caller runs within [`Self::on_thread`].
    #[expect(unsafe_code, reason = "operands are pointers")]
    pub(crate) unsafe fn run(&self, call: &TileCall) {
        // SAFETY: as above; the instruction set was detected before the level was chosen.
        unsafe { (self.compute)(call) }
    }
}
