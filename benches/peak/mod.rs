//! Measures the peak rate of this machine: loops of one multiply-add instruction without memory access, on every thread.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::time::Instant;

/// Instruction set and 10⁹ operations a second of all threads; a multiply-add counts as two.
pub(crate) fn measure(threads: usize) -> Vec<(&'static str, f64)> {
    let mut found = Vec::new();
    for (name, here, operations, run) in kinds() {
        if here {
            let each = || std::iter::repeat_with(run).take(3).fold(0.0, f64::max);
            let together: f64 = std::thread::scope(|scope| {
                let all: Vec<_> = (0..threads).map(|_| scope.spawn(each)).collect();
                all.into_iter().map(|one| one.join().unwrap_or(f64::NAN)).sum()
            });
            found.push((name, together * operations / 1e9));
        }
    }
    found
}

/// Name, true if this machine has it, operations per instruction, and instructions a second.
type Kind = (&'static str, bool, f64, fn() -> f64);

#[cfg(target_arch = "x86_64")]
macro_rules! registers {
    ($instruction:literal, $register:literal) => {
        || {
            const ROUNDS: u64 = 4_000_000;
            let start = Instant::now();
            // SAFETY: `kinds` checked that the instruction exists, and it touches only the named registers.
            #[expect(unsafe_code, reason = "one instruction is timed")]
            unsafe {
                asm!(
                    "2:",
                    concat!($instruction, " ", $register, "0,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "1,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "2,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "3,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "4,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "5,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "6,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "7,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "8,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "9,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "10,", $register, "14,", $register, "15"),
                    concat!($instruction, " ", $register, "11,", $register, "14,", $register, "15"),
                    "dec {rounds}", "jnz 2b", rounds = inout(reg) ROUNDS => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nomem, nostack)
                );
            }
            12.0 * ROUNDS as f64 / start.elapsed().as_secs_f64()
        }
    };
}

#[cfg(target_arch = "x86_64")]
fn kinds() -> Vec<Kind> {
    use std::arch::is_x86_feature_detected as has;
    vec![
        ("portable f32", true, 8.0, || registers_portable()),
        ("avx2 f32", has!("avx2") && has!("fma"), 16.0, registers!("vfmadd231ps", "ymm")),
        ("avx512 f32", has!("avx512f"), 32.0, registers!("vfmadd231ps", "zmm")),
        ("avx512 bf16", has!("avx512bf16"), 64.0, registers!("vdpbf16ps", "zmm")),
        ("avx512 int8", has!("avx512vnni"), 128.0, registers!("vpdpbusd", "zmm")),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn kinds() -> Vec<Kind> {
    vec![("portable f32", true, 8.0, || registers_portable())]
}

/// Twelve independent sums of four numbers, with the compiler's baseline instructions.
fn registers_portable() -> f64 {
    const ROUNDS: usize = 4_000_000;
    let mut sums = [[0.0_f32; 4]; 8];
    let (x, y) = (std::hint::black_box([1.0e-9_f32; 4]), std::hint::black_box([0.5_f32; 4]));
    let start = Instant::now();
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for ((sum, x), y) in sum.iter_mut().zip(x).zip(y) {
                *sum = *sum * x + y;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(sums);
    8.0 * ROUNDS as f64 / seconds
}
