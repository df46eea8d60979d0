//! Exponentials and activations of one f32, written so that loops over them vectorize.

/// Adding it rounds to an integer and leaves that integer in the low bits.
const ROUNDER: f32 = 12_582_912.0; // 1.5 · 2²³

/// `e^x` to 2 units in the last place; 0 below -87, `e^88` above 88. NaN stays NaN.
///
/// `x = n ln 2 + r`, a polynomial for `e^r` (Cephes `expf`), and `2^n` through the exponent bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 355.0 / 512.0; // few enough digits that n · LN2_HIGH is exact
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

/// `2^x` for `x` up to about 0, to 2 units in the last place; 0 below -126. NaN stays NaN.
///
/// `x = n + r` with `r` within half of 0, the series of `e^(r ln 2)`, and `2^n` through the exponent bits.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
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
