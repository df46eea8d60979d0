//! Compares the AMX kernels with sums in f64 and i64, and tests the forms of tile instructions that the kernels do not use.
//! On a processor without AMX the emulator runs them, and the log says so.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::arch::asm;

use sdxl_worker::kernels::amx_probe::{self, Product, STRIDE};

use crate::tile_emulator::{Runner, executed, install};

/// xorshift64*: the same cases in every run.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }
}

/// Rows of the left operand, and outputs of a panel.
const SIDE: usize = 32;

/// A left operand of `rows` rows in memory full of `garbage`, from `value(row, depth)`.
fn packed_rows<T: Copy>(rows: usize, depth: usize, garbage: T, mut value: impl FnMut(usize, usize) -> T) -> Vec<T> {
    let stride = STRIDE / size_of::<T>();
    let mut memory = vec![garbage; SIDE * stride];
    for row in 0..rows {
        for k in 0..depth {
            memory[row * stride + k] = value(row, k);
        }
    }
    memory
}

/// A panel `[depth/group][32][group]` from `value(output, depth)`.
fn packed_panel<T: Copy>(depth: usize, group: usize, zero: T, mut value: impl FnMut(usize, usize) -> T) -> Vec<T> {
    let mut panel = vec![zero; depth * SIDE];
    for k in 0..depth {
        for output in 0..SIDE {
            panel[(k / group * SIDE + output) * group + k % group] = value(output, k);
        }
    }
    panel
}

/// Runs `tests` on the processor's tiles or under the emulator, and checks that instructions were executed.
fn on_tiles(tests: impl FnOnce()) {
    let runner = install();
    let before = executed();
    tests();
    let emulated = executed() - before;
    eprintln!("{} ({emulated} instructions emulated)", runner.describe());
    assert_eq!(emulated > 0, runner == Runner::Emulator, "{runner:?}, {emulated} emulated");
}

struct Case {
    depth: usize,
    rows: usize,
    add: bool,
    /// Rows that the kernel may write.
    written: usize,
}

fn cases(dice: &mut Dice, step: usize) -> Vec<Case> {
    let edges = [(1, 1), (1, 16), (1, 17), (1, 32), (16, 1), (16, 16), (16, 17), (16, 32)];
    let random: Vec<_> = (0..56).map(|_| (1 + dice.below(16), 1 + dice.below(32))).collect();
    edges
        .into_iter()
        .chain(random)
        .flat_map(|(steps, rows)| {
            [false, true].map(|add| Case { depth: steps * step, rows, add, written: rows.next_multiple_of(16) })
        })
        .collect()
}

fn wide(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

#[test]
fn bf16_tile_products_match_sums_in_f64() {
    const GARBAGE: u16 = 0x7fc0; // NaN
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut worst = 0f64;
    on_tiles(|| {
        for Case { depth, rows, add, written } in cases(&mut dice, 32) {
            // Both signs and magnitudes of 2⁻⁵ to 2³, so that sums have to be rounded.
            let mut number = || (dice.next() as u16 & 0x83ff) + 0x3d00;
            let a = packed_rows(rows, depth, GARBAGE, |_, _| number());
            let b = packed_panel(depth, 2, 0, |_, _| number());
            let before: Vec<f32> = (0..SIDE * SIDE).map(|_| wide(number()) as f32).collect();
            let mut c = before.clone();
            amx_probe::bf16(Product { a: &a, b: &b, c: &mut c, depth, rows, add });
            for row in 0..rows {
                for output in 0..SIDE {
                    let at = row * SIDE + output;
                    let start = if add { f64::from(before[at]) } else { 0.0 };
                    let (mut sum, mut size) = (start, start.abs());
                    for k in 0..depth {
                        let product = wide(a[row * STRIDE / 2 + k]) * wide(b[(k / 2 * SIDE + output) * 2 + k % 2]);
                        sum += product;
                        size += product.abs();
                    }
                    let error = (f64::from(c[at]) - sum).abs() / size;
                    worst = worst.max(error);
                    assert!(
                        error < 1e-6,
                        "depth {depth}, {rows} rows, add {add}: [{row}, {output}] is {}, expected {sum}",
                        c[at]
                    );
                }
            }
            assert_eq!(c[written * SIDE..], before[written * SIDE..], "rows beyond the tile, {rows} rows");
        }
    });
    eprintln!("largest error {worst:e} of the sum of magnitudes");
}

#[test]
fn int8_tile_products_are_exact() {
    let mut dice = Dice(0xd1b5_4a32_d192_ed03);
    on_tiles(|| {
        for Case { depth, rows, add, written } in cases(&mut dice, 64) {
            let mut number = || match dice.below(8) {
                0 => i8::MIN,
                1 => i8::MAX,
                _ => dice.next() as i8,
            };
            let a = packed_rows(rows, depth, 0x55, |_, _| number());
            let b = packed_panel(depth, 4, 0, |_, _| number());
            let before: Vec<i32> = (0..SIDE * SIDE).map(|_| i32::from(number()) * 1001).collect();
            let mut c = before.clone();
            amx_probe::int8(Product { a: &a, b: &b, c: &mut c, depth, rows, add });
            for row in 0..rows {
                for output in 0..SIDE {
                    let at = row * SIDE + output;
                    let products = (0..depth)
                        .map(|k| i64::from(a[row * STRIDE + k]) * i64::from(b[(k / 4 * SIDE + output) * 4 + k % 4]));
                    let expected = products.sum::<i64>() + if add { i64::from(before[at]) } else { 0 };
                    assert_eq!(i64::from(c[at]), expected, "depth {depth}, {rows} rows, add {add}: [{row}, {output}]");
                }
            }
            assert_eq!(c[written * SIDE..], before[written * SIDE..], "rows beyond the tile, {rows} rows");
        }
    });
}

#[test]
fn int8_sums_wrap_around() {
    let a = packed_rows(1, 64, 0i8, |_, _| 1);
    let b = packed_panel(64, 4, 0i8, |_, _| 1);
    let mut c = vec![i32::MAX - 60; SIDE * SIDE];
    on_tiles(|| amx_probe::int8(Product { a: &a, b: &b, c: &mut c, depth: 64, rows: 1, add: true }));
    assert_eq!(c[..SIDE], [i32::MIN + 3; SIDE]);
}

#[test]
fn tiles_flush_denormals_to_zero() {
    // The largest denormal bf16, the smallest normal one, and 1.
    const DENORMAL: u16 = 0x007f;
    const MIN_NORMAL: u16 = 0x0080;
    const ONE: u16 = 0x3f80;
    fn check(left: u16, right: u16, start: f32, expected: f32) {
        let a = packed_rows(1, 32, 0, |_, k| if k == 0 { left } else { 0 });
        let b = packed_panel(32, 2, 0, |_, k| if k == 0 { right } else { 0 });
        let mut c = vec![start; SIDE * SIDE];
        amx_probe::bf16(Product { a: &a, b: &b, c: &mut c, depth: 32, rows: 1, add: true });
        assert_eq!(c[0].to_bits(), expected.to_bits(), "{left:#x} · {right:#x} + {start:e} is {:e}", c[0]);
    }
    on_tiles(|| {
        check(DENORMAL, ONE, 0.0, 0.0);
        check(MIN_NORMAL, ONE, 0.0, f32::MIN_POSITIVE);
        check(MIN_NORMAL, 0x3f00, 0.0, 0.0);
        check(ONE, ONE, f32::MIN_POSITIVE / 2.0, 1.0);
        check(0, 0, f32::MIN_POSITIVE / 2.0, 0.0);
    });
}

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

impl TileConfig {
    /// `tiles` are rows and bytes in a row.
    fn new(tiles: &[(u8, u8)]) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        for (tile, (rows, row_bytes)) in tiles.iter().enumerate() {
            bytes[48 + tile] = *rows;
            bytes[16 + 2 * tile] = *row_bytes;
        }
        Self(bytes)
    }
}

#[test]
#[expect(unsafe_code, reason = "inline assembly")]
fn tile_loads_support_every_address_form() {
    let from: Vec<u8> = (0..8192).map(|i| (i * 7 + i / 256) as u8).collect();
    let start = 2048;
    // Copies a tile of 16 × 64 bytes, loaded by one form of operand from `start`, to rows 64 bytes apart.
    macro_rules! check {
        ($stride:expr, $load:literal, $base:tt = $at:expr, $index:tt = $count:expr) => {{
            let shape = TileConfig::new(&[(16, 64); 8]);
            let mut to = vec![0u8; 16 * 64];
            // SAFETY: tile instructions run here, and 16 rows of `from` and `to` exist at these addresses.
            unsafe {
                asm!(
                    "ldtilecfg [rax]",
                    $load,
                    "tilestored [rdx + rcx*1], tmm7",
                    "tilerelease",
                    in("rax") &raw const shape, in("rdx") to.as_mut_ptr(), in("rcx") 64usize,
                    in($base) from.as_ptr().wrapping_offset($at), in($index) $count as isize,
                    options(nostack)
                );
            }
            for row in 0..16isize {
                let at = usize::try_from(start + row * $stride).unwrap_or_default();
                let got = &to[row as usize * 64..][..64];
                assert_eq!(got, &from[at..at + 64], "{}, row {row}", $load);
            }
        }};
    }
    on_tiles(|| {
        check!(64isize, "tileloadd tmm7, [rsi + rdi]", "rsi" = start, "rdi" = 64);
        check!(136isize, "tileloadd tmm7, [rsi + rdi*2 + 8]", "rsi" = start - 8, "rdi" = 68);
        check!(256isize, "tileloadd tmm7, [r8 + r9*4 - 128]", "r8" = start + 128, "r9" = 64);
        check!(72isize, "tileloadd tmm7, [r13 + r12*8]", "r13" = start, "r12" = 9);
        check!(72isize, "tileloadd tmm7, [r12 + r13*8]", "r12" = start, "r13" = 9);
        check!(200isize, "tileloadd tmm7, [r12 + rdi*1 + 1000]", "r12" = start - 1000, "rdi" = 200);
        check!(200isize, "tileloadd tmm7, [rsi + r14*1 - 300]", "rsi" = start + 300, "r14" = 200);
        check!(-64isize, "tileloadd tmm7, [r15 + r11*2 + 129]", "r15" = start - 129, "r11" = -32);
        check!(0isize, "tileloadd tmm7, [r10 + riz*1]", "r10" = start, "r11" = 0);
        check!(80isize, "tileloaddt1 tmm7, [r10 + r11*1]", "r10" = start, "r11" = 80);
    });
}

#[test]
#[expect(unsafe_code, reason = "inline assembly")]
fn tiles_can_be_smaller_than_their_registers() {
    // 3 × 5 words times 5 × 7 words.
    const ROWS: usize = 3;
    const DEPTH: usize = 20;
    const OUTPUTS: usize = 7;
    let shape = TileConfig::new(&[(16, 64), (3, 20), (16, 64), (5, 28), (16, 64), (3, 28), (16, 64), (16, 64)]);
    let left: Vec<i8> = (0..ROWS * DEPTH).map(|i| (i * 37 % 251) as u8 as i8).collect();
    let right: Vec<i8> = (0..OUTPUTS * DEPTH).map(|i| (i * 91 % 253) as u8 as i8).collect(); // [5][7][4]
    let mut sums = [-1i32; ROWS * 16];
    on_tiles(|| {
        // SAFETY: tile instructions run here, and the configuration matches the operands; rows of sums are 64 bytes apart.
        unsafe {
            asm!(
                "ldtilecfg [rax + rcx*4 - 80]",
                "tileloadd tmm1, [rsi + rcx*1]",
                "tileloadd tmm3, [rdi + r8*1]",
                "tilezero tmm5",
                "tdpbssd tmm5, tmm1, tmm3",
                "tilestored [rdx + r9*1], tmm5",
                "tilerelease",
                in("rax") &raw const shape, in("rcx") DEPTH, in("rsi") left.as_ptr(), in("rdi") right.as_ptr(),
                in("r8") OUTPUTS * 4, in("rdx") sums.as_mut_ptr(), in("r9") 64usize,
                options(nostack)
            );
        }
    });
    for row in 0..ROWS {
        for output in 0..16 {
            let products = (0..DEPTH)
                .map(|k| i32::from(left[row * DEPTH + k]) * i32::from(right[(k / 4 * OUTPUTS + output) * 4 + k % 4]));
            let expected = if output < OUTPUTS { products.sum() } else { -1 };
            assert_eq!(sums[row * 16 + output], expected, "[{row}, {output}]");
        }
    }
}

#[test]
fn threads_have_separate_tiles() {
    on_tiles(|| {
        std::thread::scope(|threads| {
            for value in 1..=4i8 {
                threads.spawn(move || {
                    let a = packed_rows(SIDE, 1024, 0, |_, _| value);
                    let b = packed_panel(1024, 4, 0, |_, _| 1);
                    let mut c = vec![0; SIDE * SIDE];
                    for _ in 0..50 {
                        amx_probe::int8(Product { a: &a, b: &b, c: &mut c, depth: 1024, rows: SIDE, add: false });
                        assert!(c.iter().all(|sum| *sum == i32::from(value) * 1024), "{value}: {c:?}");
                    }
                });
            }
        });
    });
}

#[test]
#[expect(unsafe_code, reason = "inline assembly in a child that it ends")]
fn tile_misuse_ends_the_process() {
    /// Checks that a signal ends a child that runs `misuse`.
    fn check(what: &str, misuse: impl FnOnce()) {
        let mut status = 0;
        // SAFETY: the child leaves no core, runs instructions and ends, all of it async-signal-safe; the parent waits.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
                libc::close(libc::STDERR_FILENO);
                misuse();
                libc::_exit(0);
            }
            assert!(child > 0, "no child");
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        }
        let expected: &[_] = match install() {
            Runner::Emulator => &[libc::SIGABRT],
            Runner::Processor => &[libc::SIGILL, libc::SIGSEGV],
        };
        let ended = libc::WIFSIGNALED(status) && expected.contains(&libc::WTERMSIG(status));
        assert!(ended, "{what}: status {status:#x}, expected one of the signals {expected:?}");
    }
    // Configures the tiles, then runs the instruction; an empty one tests the configuration alone.
    macro_rules! check_after {
        ($shape:expr, $instruction:literal) => {{
            let shape = $shape;
            let memory = [0u8; 2048];
            check(concat!("`", $instruction, "`"), || {
                // SAFETY: the instruction raises a fault before it touches memory.
                unsafe {
                    asm!(
                        "ldtilecfg [rax]",
                        $instruction,
                        in("rax") &raw const shape, in("rdx") &raw const memory, in("rcx") 64usize,
                        options(nostack)
                    );
                }
            });
        }};
    }
    let full = || TileConfig::new(&[(16, 64); 8]);
    let with = |at: usize, byte: u8| {
        let mut shape = full();
        shape.0[at] = byte;
        shape
    };
    on_tiles(|| {
        amx_probe::int8(Product {
            a: &packed_rows(1, 64, 0, |_, _| 1),
            b: &packed_panel(64, 4, 0, |_, _| 1),
            c: &mut [0; SIDE * SIDE],
            depth: 64,
            rows: 1,
            add: false,
        });
        check_after!(full(), "ud2");
        check_after!(with(0, 2), ""); // a palette that does not exist
        check_after!(with(5, 1), ""); // reserved
        check_after!(with(48, 17), ""); // rows
        check_after!(with(16, 65), ""); // bytes in a row
        check_after!(with(48, 0), ""); // no rows of 64 bytes
        check_after!(with(0, 0), "tilezero tmm0"); // palette 0 releases
        check_after!(TileConfig::new(&[(16, 64)]), "tileloadd tmm1, [rdx + rcx*1]"); // a tile that is not configured
        check_after!(full(), ".byte 0xc4, 0xe2, 0x7a, 0x5c, 0xc1"); // tdpbf16ps tmm0, tmm1, tmm0
        check_after!(TileConfig::new(&[(16, 64), (16, 60), (16, 64)]), "tdpbssd tmm0, tmm1, tmm2");
        check_after!(TileConfig::new(&[(16, 64), (16, 64), (16, 60)]), "tdpbssd tmm0, tmm1, tmm2");
        check_after!(TileConfig::new(&[(15, 64), (16, 64), (16, 64)]), "tdpbf16ps tmm0, tmm1, tmm2");
    });
}
