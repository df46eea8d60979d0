//! Loops over slices, compiled once per instruction set and picked at run time. The body is the same everywhere and
//! never contracts multiply and add, so every level gives the same bits.

use std::sync::atomic::{AtomicU8, Ordering};

use super::element::{Element, Numbers};
use crate::kernels::Activation;

/// Accumulators kept side by side in a reduction.
const LANES: usize = 16;

/// Instruction sets the loops are compiled for, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    Portable = 1,
    Avx2 = 2,
    Avx512 = 3,
}

/// 0: not yet looked at.
static LEVEL: AtomicU8 = AtomicU8::new(0);

fn best() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let has = |wide: bool| {
            if wide {
                std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            } else {
                std::arch::is_x86_feature_detected!("avx2")
            }
        };
        if has(true) {
            return Level::Avx512;
        }
        if has(false) {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// The level in use.
#[must_use]
pub fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        1 => Level::Portable,
        2 => Level::Avx2,
        3 => Level::Avx512,
        _ => limit(Level::Avx512),
    }
}

/// Uses no more than `most` from now on, in the whole process; gives what the machine makes of it. For tests that
/// compare the levels.
pub fn limit(most: Level) -> Level {
    let best = best();
    let chosen = if (most as u8) < (best as u8) { most } else { best };
    LEVEL.store(chosen as u8, Ordering::Relaxed);
    chosen
}

macro_rules! levels {
    ($($(#[$doc:meta])* fn $name:ident $(<$t:ident>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$doc])*
        #[cfg_attr(
            target_arch = "x86_64",
            expect(unsafe_code, reason = "calls of functions compiled for more than the baseline")
        )]
        pub(super) fn $name $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<$t: Element>)? ($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                match level() {
                    // SAFETY: `level` gives `Avx512` only where these features were detected.
                    Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: `level` gives `Avx2` only where it was detected.
                    Level::Avx2 => return unsafe { avx2($($arg),*) },
                    Level::Portable => {}
                }
            }
            portable($($arg),*)
        }
    )*};
}

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

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// `x · Φ(x)`. `Φ(-z) = t P(t) e^(-z²/2)` with `t = 1/(1 + 0.24 z)`; `P` is fitted to `erfcx` with a relative error of
/// 4e-9 over the whole tail, so nothing cancels for negative `x`.
#[inline(always)]
fn gelu(x: f32) -> f32 {
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

levels! {
    fn widen_slice<T>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }

    fn round_slice<T>(from: &[f32], to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::round(*from);
        }
    }

    fn add(to: &mut [f32], from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }

    fn add_widened<T>(to: &mut [f32], from: &[T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from.widen();
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

    fn silu_slice(values: &mut [f32]) {
        for value in values {
            *value = silu(*value);
        }
    }

    fn gelu_slice(values: &mut [f32]) {
        for value in values {
            *value = gelu(*value);
        }
    }

    fn quick_gelu_slice(values: &mut [f32]) {
        for value in values {
            *value = quick_gelu(*value);
        }
    }

    fn silu_into<T>(from: &[T], to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::round(silu(from.widen()));
        }
    }

    fn gelu_into<T>(from: &[T], to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::round(gelu(from.widen()));
        }
    }

    fn quick_gelu_into<T>(from: &[T], to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::round(quick_gelu(from.widen()));
        }
    }

    /// `value · gelu(gate)`
    fn gated<T>(value: &[f32], gate: &[f32], to: &mut [T]) {
        for ((to, value), gate) in to.iter_mut().zip(value).zip(gate) {
            *to = T::round(value * gelu(*gate));
        }
    }

    /// The greatest number; NaN is passed over, -∞ for none.
    fn greatest(values: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for (lane, value) in lanes.iter_mut().zip(block) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane = if *value > *lane { *value } else { *lane };
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// Replaces each `x` by `e^(x - greatest)` and gives their sum.
    fn exponentials(values: &mut [f32], greatest: f32) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let (blocks, rest) = values.as_chunks_mut::<LANES>();
        for block in blocks {
            for (lane, value) in lanes.iter_mut().zip(block) {
                *value = exp(*value - greatest);
                *lane += *value;
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *value = exp(*value - greatest);
            *lane += *value;
        }
        lanes.into_iter().sum()
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
            for ((to, from), ((mean, scale), shift)) in to.iter_mut().zip(from).zip(mean.iter().zip(scale).zip(shift)) {
                *to = T::round((from.widen() - mean) * scale + shift);
            }
        }
    }

    /// [`normalise`], then SiLU.
    fn normalise_silu<T>(from: &[T], mean: &[f32], scale: &[f32], shift: &[f32], to: &mut [T]) {
        let channels = mean.len().max(1);
        for (to, from) in to.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
            for ((to, from), ((mean, scale), shift)) in to.iter_mut().zip(from).zip(mean.iter().zip(scale).zip(shift)) {
                *to = T::round(silu((from.widen() - mean) * scale + shift));
            }
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
        for ((to, from), (weight, bias)) in to.iter_mut().zip(from).zip(weight.iter().zip(bias)) {
            *to = T::round((from.widen() - mean - missed) * scale * weight + bias);
        }
    }
}

pub(super) fn activate(kind: Activation, values: &mut [f32]) {
    match kind {
        Activation::Silu => silu_slice(values),
        Activation::Gelu => gelu_slice(values),
        Activation::QuickGelu => quick_gelu_slice(values),
    }
}

pub(super) fn activate_into<T: Element>(kind: Activation, from: &[T], to: &mut [T]) {
    match kind {
        Activation::Silu => silu_into(from, to),
        Activation::Gelu => gelu_into(from, to),
        Activation::QuickGelu => quick_gelu_into(from, to),
    }
}

impl Numbers<'_> {
    /// The numbers from `start` on, widened, as many as `to` takes.
    pub(super) fn widen_at(self, start: usize, to: &mut [f32]) {
        let range = start..start + to.len();
        match self {
            Self::F32(from) => to.copy_from_slice(&from[range]),
            Self::Bf16(from) => widen_slice(&from[range], to),
            Self::F16(from) => widen_slice(&from[range], to),
        }
    }

    /// Adds the numbers from `start` on to `to`.
    pub(super) fn add_at(self, start: usize, to: &mut [f32]) {
        let range = start..start + to.len();
        match self {
            Self::F32(from) => add(to, &from[range]),
            Self::Bf16(from) => add_widened(to, &from[range]),
            Self::F16(from) => add_widened(to, &from[range]),
        }
    }
}
