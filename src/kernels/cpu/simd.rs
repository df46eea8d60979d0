//! Loops over slices, compiled once per instruction set and picked at run time. The body is the same everywhere and
//! never contracts multiply and add, so every level gives the same bits.

use std::sync::atomic::{AtomicU8, Ordering};

use half::f16;

use crate::kernels::Activation;
use crate::kernels::cpu::attention::Scores;
use crate::kernels::cpu::element::Element;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::micro::amx;

/// Accumulators kept side by side in a reduction.
const LANES: usize = 16;

/// Instruction sets, the least first; each has what those before it have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// What every machine of the architecture has.
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

/// 0: not yet looked at.
static LEVEL: AtomicU8 = AtomicU8::new(0);

impl Level {
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// As the command line has it.
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

    /// Whether this machine has it.
    #[must_use]
    pub fn is_here(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            match self {
                Self::Portable => true,
                Self::Avx2 => has!("avx2") && has!("fma"),
                Self::Avx512 => {
                    Self::Avx2.is_here() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
                }
                Self::Avx512Bf16 => Self::Avx512.is_here() && has!("avx512bf16"),
                Self::Amx => Self::Avx512Bf16.is_here() && amx::available(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }
}

/// The level that is fastest here.
#[must_use]
pub fn best() -> Level {
    #[cfg(target_arch = "x86_64")]
    if Level::Avx512Bf16.is_here() && amx::native() {
        return Level::Amx;
    }
    let below = Level::ALL.into_iter().rev().filter(|level| *level < Level::Amx);
    let most = below.into_iter().find(|level| level.is_here()).unwrap_or(Level::Portable);
    // Intel's cores finish one `vdpbf16ps` in the time of four f32 multiply-adds of half its work each (measured on
    // Sapphire Rapids: 86 and 176 GF/s a core); AMD's take it at full rate.
    if most == Level::Avx512Bf16 && !is_amd() { Level::Avx512 } else { most }
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
pub fn level() -> Level {
    let stored = LEVEL.load(Ordering::Relaxed);
    match Level::ALL.into_iter().find(|level| *level as u8 == stored) {
        Some(level) => level,
        None => choose(best()),
    }
}

/// Uses `wanted` from now on in the whole process, or the most below it that is here, and gives what it is.
pub fn choose(wanted: Level) -> Level {
    let here = Level::ALL.into_iter().rev().find(|level| *level <= wanted && level.is_here());
    let chosen = here.unwrap_or(Level::Portable);
    LEVEL.store(chosen as u8, Ordering::Relaxed);
    chosen
}

/// Whether the processor itself rounds to bf16. Asked within loops that [`levels`] compiles for that level too, into which
/// the instruction then comes without a call.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn rounds_bf16() -> bool {
    LEVEL.load(Ordering::Relaxed) >= Level::Avx512Bf16 as u8
}

macro_rules! levels {
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
                match $crate::kernels::simd::level() {
                    // SAFETY: `level` gives `Avx512Bf16` and what is above only where these features were detected.
                    $crate::kernels::simd::Level::Avx512Bf16 | $crate::kernels::simd::Level::Amx => return unsafe { avx512_bf16($($arg),*) },
                    // SAFETY: `level` gives `Avx512` only where these features were detected.
                    $crate::kernels::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: `level` gives `Avx2` only where it was detected.
                    $crate::kernels::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::simd::Level::Portable => {}
                }
            }
            portable($($arg),*)
        }
    )*};
}

pub(crate) use levels;

/// `e^x` to 2 units in the last place; 0 below -87, `e^88` above 88. NaN stays NaN.
///
/// `x = n ln 2 + r`, a polynomial for `e^r` (Cephes `expf`), and `2^n` through the exponent bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer and leaves that integer in the low bits.
    const ROUNDER: f32 = 12_582_912.0; // 1.5 · 2²³
    const LN2_HIGH: f32 = 355.0 / 512.0; // so few digits that n times it is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127) << 23);
    let y = (p * (r * r) + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { y }
}

/// `2^x` for `x` of at most about 0, to 2 units in the last place; 0 below -126. NaN stays NaN.
///
/// `x = n + r` with `r` within half of 0, the series of `e^(r ln 2)`, and `2^n` through the exponent bits.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0; // as in `exp`
    let clamped = if x < -126.0 { -126.0 } else { x };
    let shifted = clamped + ROUNDER;
    let r = clamped - (shifted - ROUNDER);
    let mut p = 1.540_353e-4;
    p = p * r + 1.333_355_8e-3;
    p = p * r + 9.618_129e-3;
    p = p * r + 5.550_411e-2;
    p = p * r + 2.402_265e-1;
    p = p * r + 6.931_472e-1;
    p = p * r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127) << 23);
    if x < -126.0 { 0.0 } else { p * power }
}

/// Joins 32 numbers to one, halves at a time.
#[inline(always)]
fn fold(lanes: [f32; 32], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    for half in [16, 8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low = join(*low, *high);
        }
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
pub(crate) fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// `x · Φ(x)`. `Φ(-z) = t P(t) e^(-z²/2)` with `t = 1/(1 + 0.24 z)`; `P` is fitted to `erfcx` with a relative error of
/// 4e-9 over the whole tail, so nothing cancels for negative `x`.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.24 * z);
    let mut p = 0.025_855_944;
    p = p * t - 0.126_441_63;
    p = p * t + 0.209_756_18;
    p = p * t - 0.150_022_54;
    p = p * t + 0.146_280_3;
    p = p * t + 0.025_535_625;
    p = p * t + 0.088_678_41;
    p = p * t + 0.088_735_29;
    p = p * t + 0.095_881_63;
    p = p * t + 0.095_740_795;
    let tail = p * t * exp(-0.5 * z * z);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// Rounds `value` of each number of `from`.
#[inline(always)]
fn map_into<T: Element>(from: &[T], to: &mut [T], value: impl Fn(f32) -> f32) {
    let ((blocks, rest), (to_blocks, to_rest)) = (from.as_chunks::<LANES>(), to.as_chunks_mut::<LANES>());
    for (to, from) in to_blocks.iter_mut().zip(blocks) {
        let mut line = [0.0; LANES];
        for (line, x) in line.iter_mut().zip(from) {
            *line = value(x.widen());
        }
        T::round_block(&line, to);
    }
    for (to, from) in to_rest.iter_mut().zip(rest) {
        *to = T::round(value(from.widen()));
    }
}

/// Rounds `after((x - mean) · scale + shift)` of each number of a row.
#[inline(always)]
fn normalise_row<T: Element>(from: &[T], [mean, scale, shift]: [&[f32]; 3], to: &mut [T], after: impl Fn(f32) -> f32) {
    let ((means, mean), (scales, scale)) = (mean.as_chunks::<LANES>(), scale.as_chunks::<LANES>());
    let ((shifts, shift), (blocks, rest)) = (shift.as_chunks::<LANES>(), from.as_chunks::<LANES>());
    let (to_blocks, to_rest) = to.as_chunks_mut::<LANES>();
    let per_channel = means.iter().zip(scales).zip(shifts);
    for ((to, from), ((mean, scale), shift)) in to_blocks.iter_mut().zip(blocks).zip(per_channel) {
        let mut line = [0.0; LANES];
        for i in 0..LANES {
            line[i] = after((from[i].widen() - mean[i]) * scale[i] + shift[i]);
        }
        T::round_block(&line, to);
    }
    for ((to, from), ((mean, scale), shift)) in to_rest.iter_mut().zip(rest).zip(mean.iter().zip(scale).zip(shift)) {
        *to = T::round(after((from.widen() - mean) * scale + shift));
    }
}

levels! {
    fn widen_slice<T>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }

    /// `[n, 32, 2]` bf16 to `[2n, 32]`.
    fn widen_pairs(from: &[u32], to: &mut [f32]) {
        for (to, from) in to.as_chunks_mut::<64>().0.iter_mut().zip(from.as_chunks::<32>().0) {
            let (even, odd) = to.split_at_mut(32);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(from) {
                *even = f32::from_bits(pair << 16);
                *odd = f32::from_bits(pair & 0xffff_0000);
            }
        }
    }

    /// `[n, 32, 2]` f16 to `[2n, 32]`.
    fn widen_half_pairs(from: &[u32], to: &mut [f32]) {
        for (to, from) in to.as_chunks_mut::<64>().0.iter_mut().zip(from.as_chunks::<32>().0) {
            let (even, odd) = to.split_at_mut(32);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(from) {
                *even = f16::from_bits(*pair as u16).widen();
                *odd = f16::from_bits((pair >> 16) as u16).widen();
            }
        }
    }

    /// Pairs of each number of `even` with that of `odd`; where both have 32, without a loop's rest.
    fn interleave<T>(even: &[T], odd: &[T], to: &mut [T]) {
        if let (Some(even), Some(odd)) = (even.first_chunk::<32>(), odd.first_chunk::<32>()) {
            for ((to, even), odd) in to.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                *to = [*even, *odd];
            }
        } else {
            for ((to, even), odd) in to.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                *to = [*even, *odd];
            }
        }
    }

    fn scale(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }

    fn round_scaled<T>(from: &[f32], factor: f32, to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::round(from * factor);
        }
    }

    fn silu_into<T>(from: &[T], to: &mut [T]) {
        map_into(from, to, silu);
    }

    fn gelu_into<T>(from: &[T], to: &mut [T]) {
        map_into(from, to, gelu);
    }

    fn quick_gelu_into<T>(from: &[T], to: &mut [T]) {
        map_into(from, to, quick_gelu);
    }

    /// `value · gelu(gate)`
    fn gated<T>(value: &[f32], gate: &[f32], to: &mut [T]) {
        for ((to, value), gate) in to.iter_mut().zip(value).zip(gate) {
            *to = T::round(value * gelu(*gate));
        }
    }

    /// The greatest of `before` and the first `seen` scores; NaN is passed over.
    fn greatest_of(scores: Scores, seen: usize, before: f32) -> f32 {
        let mut lanes = [before; 32];
        for line in 0..seen.div_ceil(32) {
            let from = scores.at(line);
            if (line + 1) * 32 <= seen {
                for (lane, value) in lanes.iter_mut().zip(from) {
                    *lane = if *value > *lane { *value } else { *lane };
                }
            } else {
                for (lane, value) in lanes.iter_mut().zip(&from[..seen - line * 32]) {
                    *lane = if *value > *lane { *value } else { *lane };
                }
            }
        }
        fold(lanes, |a, b| if b > a { b } else { a })
    }

    /// Writes `2^((x - greatest) · factor)` for each of the first `seen` scores `x`, 0 for the rest, and gives the sum.
    fn powers(scores: Scores, seen: usize, factor: f32, greatest: f32, to: &mut [f32]) -> f32 {
        let shift = greatest * factor;
        let mut lanes = [0.0_f32; 32];
        for (line, to) in to.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (to, x) in to.iter_mut().zip(scores.at(line)) {
                *to = exp2(*x * factor - shift);
            }
            if (line + 1) * 32 > seen {
                to[seen.saturating_sub(line * 32)..].fill(0.0);
            }
            for (lane, x) in lanes.iter_mut().zip(to) {
                *lane += *x;
            }
        }
        fold(lanes, |a, b| a + b)
    }

    /// Sums of `x - pivot` and of its square per channel, added to `sums` and `squares`. `rows` is `[rows, C]`.
    fn channel_sums<T>(rows: &[T], pivot: &[f32], sums: &mut [f64], squares: &mut [f64], buffer: &mut [f32]) {
        let channels = pivot.len().max(1);
        let (first, second) = buffer.split_at_mut(channels);
        // f32 carries a few rows without loss that matters; f64 carries the rest.
        for block in rows.chunks(16 * channels) {
            first.fill(0.0);
            second.fill(0.0);
            for row in block.chunks_exact(channels) {
                for (((first, second), pivot), x) in first.iter_mut().zip(&mut *second).zip(pivot).zip(row) {
                    let d = x.widen() - pivot;
                    *first += d;
                    *second += d * d;
                }
            }
            for ((sum, square), (first, second)) in
                sums.iter_mut().zip(&mut *squares).zip(first.iter().zip(second.iter()))
            {
                *sum += f64::from(*first);
                *square += f64::from(*second);
            }
        }
    }

    /// `(x - mean) · scale + shift` per channel. `from` and `to` are `[rows, C]`.
    fn normalise<T>(from: &[T], mean: &[f32], scale: &[f32], shift: &[f32], to: &mut [T]) {
        let channels = mean.len().max(1);
        for (to, from) in to.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            normalise_row(from, [mean, scale, shift], to, |x| x);
        }
    }

    /// [`normalise`], then SiLU.
    fn normalise_silu<T>(from: &[T], mean: &[f32], scale: &[f32], shift: &[f32], to: &mut [T]) {
        let channels = mean.len().max(1);
        for (to, from) in to.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            normalise_row(from, [mean, scale, shift], to, silu);
        }
    }

    /// One row of a layer norm.
    fn layer_norm_row<T>(from: &[T], weight: &[f32], bias: &[f32], eps: f64, to: &mut [T]) {
        let count = from.len().max(1) as f64;
        let (blocks, rest) = from.as_chunks::<LANES>();
        let mut lanes = [0.0_f32; LANES];
        for block in blocks {
            for (lane, x) in lanes.iter_mut().zip(block) {
                *lane += x.widen();
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += x.widen();
        }
        let mean = (lanes.into_iter().map(f64::from).sum::<f64>() / count) as f32;
        let (mut lanes, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        for block in blocks {
            for ((lane, square), x) in lanes.iter_mut().zip(&mut squares).zip(block) {
                let d = x.widen() - mean;
                *lane += d;
                *square += d * d;
            }
        }
        for ((lane, square), x) in lanes.iter_mut().zip(&mut squares).zip(rest) {
            let d = x.widen() - mean;
            *lane += d;
            *square += d * d;
        }
        // The first mean is as good as f32 sums are; what it missed is the mean of the distances to it.
        let missed = lanes.into_iter().map(f64::from).sum::<f64>() / count;
        let variance = squares.into_iter().map(f64::from).sum::<f64>() / count - missed * missed;
        let scale = (1.0 / (variance.max(0.0) + eps).sqrt()) as f32;
        let missed = missed as f32;
        let affine = weight.iter().zip(bias);
        if T::IS_F32 {
            for ((to, from), (weight, bias)) in to.iter_mut().zip(from).zip(affine) {
                *to = T::round((from.widen() - mean - missed) * scale * weight + bias);
            }
            return;
        }
        let (to_blocks, to_rest) = to.as_chunks_mut::<LANES>();
        let ((weights, weight), (biases, bias)) = (weight.as_chunks::<LANES>(), bias.as_chunks::<LANES>());
        for ((to, from), (weight, bias)) in to_blocks.iter_mut().zip(blocks).zip(weights.iter().zip(biases)) {
            let mut line = [0.0; LANES];
            for i in 0..LANES {
                line[i] = (from[i].widen() - mean - missed) * scale * weight[i] + bias[i];
            }
            T::round_block(&line, to);
        }
        for ((to, from), (weight, bias)) in to_rest.iter_mut().zip(rest).zip(weight.iter().zip(bias)) {
            *to = T::round((from.widen() - mean - missed) * scale * weight + bias);
        }
    }
}

pub(crate) fn activate_into<T: Element>(kind: Activation, from: &[T], to: &mut [T]) {
    match kind {
        Activation::Silu => silu_into(from, to),
        Activation::Gelu => gelu_into(from, to),
        Activation::QuickGelu => quick_gelu_into(from, to),
    }
}
