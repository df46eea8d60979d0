//! Instruction-set levels, and loops compiled once for each of them and chosen at run time. The body of such a loop is the
//! same everywhere and never contracts multiply and add, so every level gives the same bits.

use std::sync::atomic::{AtomicU8, Ordering};

#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::micro::amx;

/// Instruction sets in ascending order; each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum SimdLevel {
    /// The baseline of the architecture.
    Portable = 1,
    /// AVX2 and FMA.
    Avx2 = 2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512 = 3,
    /// AVX-512 BF16.
    Avx512Bf16 = 4,
    /// AMX TILE, BF16 and INT8.
    Amx = 5,
}

/// 0 until a level is chosen.
static LEVEL: AtomicU8 = AtomicU8::new(0);

impl SimdLevel {
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }

    /// True if this machine has the level's instructions.
    #[must_use]
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            match self {
                Self::Portable => true,
                Self::Avx2 => has!("avx2") && has!("fma"),
                Self::Avx512 => {
                    Self::Avx2.is_supported()
                        && has!("avx512f")
                        && has!("avx512bw")
                        && has!("avx512dq")
                        && has!("avx512vl")
                }
                Self::Avx512Bf16 => Self::Avx512.is_supported() && has!("avx512bf16"),
                Self::Amx => Self::Avx512Bf16.is_supported() && amx::available(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }
}

/// The fastest level of this machine.
#[must_use]
pub fn best() -> SimdLevel {
    #[cfg(target_arch = "x86_64")]
    if SimdLevel::Avx512Bf16.is_supported() && amx::native() {
        return SimdLevel::Amx;
    }
    let below_amx = SimdLevel::ALL.into_iter().rev().filter(|level| *level < SimdLevel::Amx);
    let highest = below_amx.into_iter().find(|level| level.is_supported()).unwrap_or(SimdLevel::Portable);
    // Intel's cores finish one `vdpbf16ps` in the time of four f32 multiply-adds of half its work each (measured on
    // Sapphire Rapids: 86 and 176 GF/s a core); AMD's run it at full rate.
    if highest == SimdLevel::Avx512Bf16 && !is_amd() { SimdLevel::Avx512 } else { highest }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    (vendor.ebx, vendor.edx, vendor.ecx)
        == (u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"enti"), u32::from_le_bytes(*b"cAMD"))
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
}

/// The level in use.
#[must_use]
pub fn level() -> SimdLevel {
    let stored = LEVEL.load(Ordering::Relaxed);
    match SimdLevel::ALL.into_iter().find(|level| *level as u8 == stored) {
        Some(level) => level,
        None => choose(best()),
    }
}

/// Sets the level of the whole process to `wanted`, or to the highest supported level below it, and returns it.
pub fn choose(wanted: SimdLevel) -> SimdLevel {
    let supported = SimdLevel::ALL.into_iter().rev().find(|level| *level <= wanted && level.is_supported());
    let chosen = supported.unwrap_or(SimdLevel::Portable);
    LEVEL.store(chosen as u8, Ordering::Relaxed);
    chosen
}

/// True if the processor rounds to bf16 itself. Loops that [`multiversion`] compiles for that level check it, so that the
/// instruction is inlined into them.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn rounds_bf16() -> bool {
    LEVEL.load(Ordering::Relaxed) >= SimdLevel::Avx512Bf16 as u8
}

/// Compiles each function once for every level and calls the version of the level in use. `T` is an
/// [`Element`](crate::kernels::cpu::element::Element).
macro_rules! multiversion {
    ($($(#[$doc:meta])* fn $name:ident $(<$t:ident>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$doc])*
        #[cfg_attr(
            target_arch = "x86_64",
            expect(unsafe_code, reason = "calls of functions compiled for more than the baseline")
        )]
        pub(crate) fn $name $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
                fn avx512_bf16 $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                match $crate::kernels::cpu::simd::level() {
                    // SAFETY: `level` returns `Avx512Bf16` and above only if these features were detected.
                    $crate::kernels::cpu::simd::SimdLevel::Avx512Bf16 | $crate::kernels::cpu::simd::SimdLevel::Amx => return unsafe { avx512_bf16($($arg),*) },
                    // SAFETY: `level` returns `Avx512` only if these features were detected.
                    $crate::kernels::cpu::simd::SimdLevel::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: `level` returns `Avx2` only if it was detected.
                    $crate::kernels::cpu::simd::SimdLevel::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::cpu::simd::SimdLevel::Portable => {}
                }
            }
            portable($($arg),*)
        }
    )*};
}

pub(crate) use multiversion;
