//! Micro-kernels on AMX, the matrix unit of Intel's Xeons: eight tile registers of 16 rows × 64 bytes, products of bf16
//! into f32 and of signed bytes into i32. Intel, Software Developer's Manual, volume 1 chapter 18 and volume 2.
//!
//! Four tiles are the 32 × 32 sums, two hold the left operand, two the weights: four loads feed four products. The code is
//! inline assembly because stable Rust lacks the intrinsics.
//!
//! These kernels have run only under emulation (`tests/kernels/tile_emulator.rs` executes their machine code instruction by
//! instruction), never on a processor with AMX, and their speed has not been measured.

use std::arch::asm;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::kernels::cpu::micro::tile::{A_STRIDE, PANEL, TileCall};

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// Bytes in a row of a tile: the part of each row of the left operand that one step multiplies.
const TILE_BYTES: usize = 64;
/// Bytes between rows of sums, and between rows of a panel (a pair of bf16, or four bytes, for each of its outputs).
const ROW: usize = PANEL * 4;
/// Depth of a step.
const BF16_STEP: usize = TILE_BYTES / 2;
const INT8_STEP: usize = TILE_BYTES;
/// Bytes from the upper tile to the lower one, in the left operand and in the sums.
const LOWER_A: usize = TILE_ROWS * A_STRIDE;
const LOWER_C: usize = TILE_ROWS * ROW;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Palette 1, every tile at its full size.
static FULL_TILES: TileConfig = {
    let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        config.row_bytes[tile] = TILE_BYTES as u16;
        config.rows[tile] = TILE_ROWS as u8;
        tile += 1;
    }
    config
};

static ASSUMED: AtomicBool = AtomicBool::new(false);

/// True if this process may use AMX for bf16 and bytes. The first call requests the tile state from the system.
pub(crate) fn available() -> bool {
    ASSUMED.load(Ordering::Relaxed) || native()
}

/// True if the processor and the system offer AMX, regardless of [`probe::assume_available`].
pub(crate) fn native() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| in_processor() && saved_by_system() && permitted())
}

/// CPUID leaf 7: AMX-BF16, AMX-TILE and AMX-INT8 are bits 22, 24 and 25 of EDX.
fn in_processor() -> bool {
    const WANTED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    let most = std::arch::x86_64::__cpuid(0).eax;
    most >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & WANTED == WANTED
}

/// XCR0: bits 17 and 18 are set if the system saves the tile configuration and contents of each thread.
#[expect(unsafe_code, reason = "xgetbv has no safe form")]
fn saved_by_system() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const WANTED: u32 = 1 << 17 | 1 << 18;
    if std::arch::x86_64::__cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let low: u32;
    // SAFETY: OSXSAVE allows `xgetbv`; register 0 always exists.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low & WANTED == WANTED
}

/// Linux grants the 8 KiB of tile contents on request, for all threads of a process.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a system call")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XTILEDATA: libc::c_ulong = 18;
    // SAFETY: this request takes a number and touches no memory of the process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// No way to request tile contents is implemented for other systems.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Configures the tiles of this thread. Every product runs between this call and [`leave`].
///
/// # Safety
/// [`available`] has returned true.
#[expect(unsafe_code, reason = "inline assembly")]
pub(crate) unsafe fn enter() {
    // SAFETY: the caller promises that AMX is available; `FULL_TILES` is a valid configuration of palette 1.
    unsafe {
        asm!("ldtilecfg [{config}]", config = in(reg) &raw const FULL_TILES, options(nostack, readonly, preserves_flags))
    };
}

/// Releases the tiles, so that the system need not save them any more.
///
/// # Safety
/// [`available`] has returned true.
#[expect(unsafe_code, reason = "inline assembly")]
pub(crate) unsafe fn leave() {
    // SAFETY: the caller promises that AMX is available.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// Prefetches the eight lines of weights that begin `$first` and `$second` bytes ahead: a step is 32 lines, and each of its
/// four products hides the latency of eight. Lines beyond the panel do not fault.
macro_rules! prefetch {
    ($first:literal, $second:literal) => {
        concat!(
            prefetch!(line $first, 0), prefetch!(line $first, 64), prefetch!(line $first, 128), prefetch!(line $first, 192),
            prefetch!(line $second, 0), prefetch!(line $second, 64), prefetch!(line $second, 128), prefetch!(line $second, 192),
        )
    };
    (line $from:literal, $line:literal) => {
        concat!("prefetcht0 [{b} + ", $from, " + ", $line, "]\n")
    };
}

/// Computes 32 × 32 sums of `$steps` steps with the product `$dot`.
macro_rules! two_by_two {
    ($dot:literal, $call:expr, $steps:expr) => {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{c} + {row}*1]",
            "tileloadd tmm1, [{c} + {row}*1 + {right}]",
            "tileloadd tmm2, [{c} + {row}*1 + {lower_c}]",
            "tileloadd tmm3, [{c} + {row}*1 + {lower_c} + {right}]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {a_row}*1]",
            "tileloadd tmm6, [{b} + {row}*1]",
            prefetch!(4096, 4352),
            concat!($dot, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{b} + {row}*1 + {right}]",
            prefetch!(4608, 4864),
            concat!($dot, " tmm1, tmm4, tmm7"),
            "tileloadd tmm5, [{a} + {a_row}*1 + {lower_a}]",
            prefetch!(5120, 5376),
            concat!($dot, " tmm2, tmm5, tmm6"),
            prefetch!(5632, 5888),
            concat!($dot, " tmm3, tmm5, tmm7"),
            "add {a}, {wide}",
            "add {b}, {step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {row}*1], tmm0",
            "tilestored [{c} + {row}*1 + {right}], tmm1",
            "tilestored [{c} + {row}*1 + {lower_c}], tmm2",
            "tilestored [{c} + {row}*1 + {lower_c} + {right}], tmm3",
            a = inout(reg) $call.a => _,
            b = inout(reg) $call.b => _,
            steps = inout(reg) $steps => _,
            c = in(reg) $call.c,
            add = in(reg) u32::from($call.add),
            row = in(reg) ROW,
            a_row = in(reg) A_STRIDE,
            right = const TILE_BYTES,
            wide = const TILE_BYTES,
            step = const TILE_ROWS * ROW,
            lower_a = const LOWER_A,
            lower_c = const LOWER_C,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// [`two_by_two`] for the upper 16 rows alone.
macro_rules! one_by_two {
    ($dot:literal, $call:expr, $steps:expr) => {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{c} + {row}*1]",
            "tileloadd tmm1, [{c} + {row}*1 + {right}]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{a} + {a_row}*1]",
            "tileloadd tmm6, [{b} + {row}*1]",
            prefetch!(4096, 4352),
            prefetch!(4608, 4864),
            concat!($dot, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{b} + {row}*1 + {right}]",
            prefetch!(5120, 5376),
            prefetch!(5632, 5888),
            concat!($dot, " tmm1, tmm4, tmm7"),
            "add {a}, {wide}",
            "add {b}, {step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {row}*1], tmm0",
            "tilestored [{c} + {row}*1 + {right}], tmm1",
            a = inout(reg) $call.a => _,
            b = inout(reg) $call.b => _,
            steps = inout(reg) $steps => _,
            c = in(reg) $call.c,
            add = in(reg) u32::from($call.add),
            row = in(reg) ROW,
            a_row = in(reg) A_STRIDE,
            right = const TILE_BYTES,
            wide = const TILE_BYTES,
            step = const TILE_ROWS * ROW,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Sums products of bf16 in f32, with denormals as zero.
///
/// # Safety
/// This thread is between [`enter`] and [`leave`]. `call.rows` is 1 to 32 and `call.depth` a multiple of 32, 32 to 512.
/// `call.a` has rows of `depth` bf16, `A_STRIDE` bytes apart, `call.b` `[depth/2][32][2]` bf16, and `call.c` rows of 32
/// f32 that nothing else accesses meanwhile. The memory of `a` and `c` extends to the next multiple of 16 rows; the additional
/// rows of `c` are overwritten.
#[expect(unsafe_code, reason = "inline assembly")]
pub(crate) unsafe fn bf16(call: &TileCall) {
    debug_assert!(call.depth > 0 && call.depth.is_multiple_of(BF16_STEP), "depth {}", call.depth);
    let steps = call.depth / BF16_STEP;
    if call.rows > TILE_ROWS {
        // SAFETY: `a` and `c` have 32 rows, `a` and `b` have `steps` steps, and the tiles are configured.
        unsafe { two_by_two!("tdpbf16ps", call, steps) }
    } else {
        // SAFETY: as above, with 16 rows.
        unsafe { one_by_two!("tdpbf16ps", call, steps) }
    }
}

/// Sums products of signed bytes in i32 that wraps around; `call.c` is rows of 32 i32.
///
/// # Safety
/// The contract of [`bf16`] with bytes: `call.depth` is a multiple of 64, 64 to 1024, and `call.b` is `[depth/4][32][4]` bytes.
#[expect(unsafe_code, reason = "inline assembly")]
pub(crate) unsafe fn int8(call: &TileCall) {
    debug_assert!(call.depth > 0 && call.depth.is_multiple_of(INT8_STEP), "depth {}", call.depth);
    let steps = call.depth / INT8_STEP;
    if call.rows > TILE_ROWS {
        // SAFETY: `a` and `c` have 32 rows, `a` and `b` have `steps` steps, and the tiles are configured.
        unsafe { two_by_two!("tdpbssd", call, steps) }
    } else {
        // SAFETY: as above, with 16 rows.
        unsafe { one_by_two!("tdpbssd", call, steps) }
    }
}

/// Lets tests run these kernels, also on processors without AMX.
pub mod probe {
    use super::{ASSUMED, BF16_STEP, INT8_STEP, Ordering};
    use crate::kernels::cpu::micro::tile::{A_STRIDE, PANEL, TileCall};

    /// One call of a kernel on memory of the test.
    pub struct Product<'a, T, S> {
        /// 32 rows, `A_STRIDE` bytes apart.
        pub a: &'a [T],
        /// `[depth/2][32][2]` bf16 or `[depth/4][32][4]` bytes.
        pub b: &'a [T],
        /// `[32][32]`
        pub c: &'a mut [S],
        pub depth: usize,
        pub rows: usize,
        pub add: bool,
    }

    /// Bytes between rows of [`Product::a`].
    pub const STRIDE: usize = A_STRIDE;

    /// True if AMX can be used: the processor has it, or [`assume_available`] was called.
    #[must_use]
    pub fn available() -> bool {
        super::available()
    }

    /// Treats AMX as available in the whole process from now on.
    ///
    /// # Safety
    /// The tile instructions are executed, for instance by a SIGILL handler that emulates them.
    #[expect(unsafe_code, reason = "a promise that cannot be checked")]
    pub unsafe fn assume_available() {
        ASSUMED.store(true, Ordering::SeqCst);
    }

    /// `product.a` and `product.b` hold the bits of bf16.
    ///
    /// # Panics
    /// Panics if the memory is smaller than the kernel needs, or without AMX.
    pub fn bf16(product: Product<'_, u16, f32>) {
        run(product, BF16_STEP, super::bf16);
    }

    /// `product.a` and `product.b` hold signed bytes.
    ///
    /// # Panics
    /// Panics if the memory is smaller than the kernel needs, or without AMX.
    pub fn int8(product: Product<'_, i8, i32>) {
        run(product, INT8_STEP, super::int8);
    }

    #[expect(unsafe_code, reason = "calls of a kernel")]
    fn run<T, S>(product: Product<'_, T, S>, step: usize, kernel: unsafe fn(&TileCall)) {
        let Product { a, b, c, depth, rows, add } = product;
        let size = size_of::<T>();
        assert!(available(), "no AMX");
        assert!(depth > 0 && depth.is_multiple_of(step) && depth * size <= 1024, "depth {depth}");
        assert!((1..=32).contains(&rows), "{rows} rows");
        assert!(size_of_val(a) >= 32 * A_STRIDE, "left operand of {} bytes", size_of_val(a));
        assert!(size_of_val(b) >= depth * PANEL * size, "panel of {} bytes", size_of_val(b));
        assert!(size_of_val(c) >= 32 * PANEL * 4, "sums of {} bytes", size_of_val(c));
        let call = TileCall { a: a.as_ptr().cast(), b: b.as_ptr().cast(), depth, c: c.as_mut_ptr().cast(), rows, add };
        // SAFETY: AMX is available, and the slices hold all that the kernel reads and writes, as was checked above.
        unsafe {
            super::enter();
            kernel(&call);
            super::leave();
        }
    }
}
