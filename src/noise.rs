//! Seeded Gaussian noise, one stream per image: torch's CPU generator, and CUDA's Philox.
//!
//! An image's noise depends on its own seed only, never on its neighbours in a batch. Draws continue each stream like
//! successive calls of `torch.randn((1, C, H, W), generator=…)` do.
//!
//! - `cpu`: MT19937 (Matsumoto & Nishimura 1998) seeded with the low 32 bits, Box–Muller in blocks of 16 as
//!   aten/src/ATen/native/cpu/DistributionTemplates.h lays it out; fewer than 16 values take its scalar path. Equal to
//!   torch's bit for bit where torch takes its AVX2 path, whatever machine this runs on: that path has Cephes'
//!   polynomials for logarithm, sine and cosine, with products and sums fused into one rounding.
//! - `nv`: Philox4x32-10 (Salmon et al. 2011), one counter per element, the layout that AUTOMATIC1111 calls "NV". It
//!   follows the published formulas and has not been compared with a GPU. On a GPU it holds while a draw has no more
//!   elements than the device has resident threads.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, StageContext};

/// The random number generator to reproduce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RngKind {
    /// `torch.randn` on the CPU.
    #[default]
    Cpu,
    /// `torch.randn` on an NVIDIA GPU.
    Nv,
}

/// The seeds of an image's noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seed {
    pub main: u64,
    pub variation: Option<Variation>,
}

/// A second stream, whose first draw is blended into the initial noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Variation {
    pub seed: u64,
    /// 0 takes the main stream only, 1 this one only.
    pub strength: f64,
}

/// The noise of the images of one batch.
pub struct NoiseSource {
    kind: RngKind,
    streams: Vec<Stream>,
    /// One per stream, or none at all.
    variations: Vec<Option<Variation>>,
    channels: usize,
    height: usize,
    width: usize,
    device: Device,
}

impl NoiseSource {
    /// One stream per seed; each draw is `[B, H, W, C]` with B the number of seeds.
    #[must_use]
    pub fn new(kind: RngKind, seeds: &[u64], channels: usize, height: usize, width: usize, device: &Device) -> Self {
        let streams = seeds.iter().map(|&seed| Stream::new(kind, seed)).collect();
        Self { kind, streams, variations: Vec::new(), channels, height, width, device: device.clone() }
    }

    /// The same streams, each with its variation.
    #[must_use]
    pub fn varied(mut self, variations: &[Option<Variation>]) -> Self {
        self.variations = variations.to_vec();
        self
    }

    /// The next draw of every stream, standard normal, f32 `[B, H, W, C]` on the device.
    ///
    /// # Errors
    /// `internal` when the device refuses the copy.
    pub fn draw(&mut self) -> Result<Tensor> {
        self.next(false)
    }

    /// The initial noise: [`Self::draw`] with the variations blended in. The streams continue as after any other draw.
    ///
    /// # Errors
    /// Those of [`Self::draw`].
    pub fn initial(&mut self) -> Result<Tensor> {
        self.next(true)
    }

    fn next(&mut self, varied: bool) -> Result<Tensor> {
        let (c, h, w) = (self.channels, self.height, self.width);
        if c * h * w == 0 {
            return Err(Error::bug("noise of an empty shape"));
        }
        let mut values = Vec::with_capacity(self.streams.len() * c * h * w);
        for (index, stream) in self.streams.iter_mut().enumerate() {
            let mut planes = stream.randn(c * h * w); // [C, H, W]
            let variation = self.variations.get(index).copied().flatten();
            if let Some(Variation { seed, strength }) = variation.filter(|one| varied && one.strength > 0.0) {
                slerp(&mut planes, &Stream::new(self.kind, seed).randn(c * h * w), strength, [c, h, w]);
            }
            for pixel in 0..h * w {
                values.extend(planes.iter().skip(pixel).step_by(h * w).copied());
            }
        }
        Tensor::from_vec(values, (self.streams.len(), h, w, c), &self.device).stage("noise")
    }
}

enum Stream {
    Cpu(Box<TorchCpu>),
    Nv(Philox),
}

impl Stream {
    fn new(kind: RngKind, seed: u64) -> Self {
        match kind {
            RngKind::Cpu => Self::Cpu(Box::new(TorchCpu::new(seed))),
            RngKind::Nv => Self::Nv(Philox { seed, draws: 0 }),
        }
    }

    fn randn(&mut self, count: usize) -> Vec<f32> {
        match self {
            Self::Cpu(torch) => torch.randn(count),
            Self::Nv(philox) => philox.randn(count),
        }
    }
}

/// Spherical interpolation by `share`: `(sin((1−t)ω) a + sin(tω) b) / sin ω`. Both are `[C, H, W]`, and every column of
/// every channel is a vector of its own, as in AUTOMATIC1111 (modules/rng.py at 0d5dc9a), including its weights for
/// nearly equal noise.
fn slerp(from: &mut [f32], to: &[f32], share: f64, [channels, height, width]: [usize; 3]) {
    let columns = || (0..channels * width).map(|i| i / width * height * width + i % width);
    let rows = |column: usize| (0..height).map(move |row| column + row * width);
    let cosine = |from: &[f32], column: usize| {
        let (mut dot, mut a, mut b) = (0.0, 0.0, 0.0);
        for at in rows(column) {
            let (x, y) = (f64::from(from[at]), f64::from(to[at]));
            dot += x * y;
            a += x * x;
            b += y * y;
        }
        dot / (a * b).sqrt()
    };
    let nearly_equal = columns().map(|column| cosine(from, column)).sum::<f64>() > 0.9995 * (channels * width) as f64;
    for column in columns() {
        let (a, b) = if nearly_equal {
            (share, 1.0 - share)
        } else {
            let angle = cosine(from, column).clamp(-1.0, 1.0).acos();
            (((1.0 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin())
        };
        for at in rows(column) {
            from[at] = (a * f64::from(from[at]) + b * f64::from(to[at])) as f32;
        }
    }
}

/// torch's CPU generator: the Mersenne twister and the second value of the last scalar Box–Muller pair.
struct TorchCpu {
    twister: Mt19937,
    cached: Option<f64>,
}

const BLOCK: usize = 16;

impl TorchCpu {
    fn new(seed: u64) -> Self {
        // torch keeps the low 32 bits of a seed.
        Self { twister: Mt19937::new((seed & 0xffff_ffff) as u32), cached: None }
    }

    fn randn(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform()).collect();
        for block in values.chunks_exact_mut(BLOCK) {
            box_muller_16(block);
        }
        if !count.is_multiple_of(BLOCK) {
            // The last 16 values are drawn again, overwriting some finished ones.
            let tail = &mut values[count - BLOCK..];
            tail.fill_with(|| self.uniform());
            box_muller_16(tail);
        }
        values
    }

    /// f32 in [0, 1) from 24 low bits.
    fn uniform(&mut self) -> f32 {
        (self.twister.next() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// f64 in [0, 1) from 53 low bits of two words, the first being the high one.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.twister.next());
        let low = u64::from(self.twister.next());
        (((high << 32) | low) & ((1 << 53) - 1)) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    fn normal(&mut self) -> f64 {
        if let Some(value) = self.cached.take() {
            return value;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * u1).sin_cos();
        self.cached = Some(radius * sin);
        radius * cos
    }
}

/// Turns sixteen uniforms into eight cosines and then eight sines.
fn box_muller_16(block: &mut [f32]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * logarithm(1.0 - *a)).sqrt();
        let (sin, cos) = sine_and_cosine(std::f32::consts::TAU * *b);
        // Adding the mean makes a negative zero positive.
        *a = radius * cos + 0.0;
        *b = radius * sin + 0.0;
    }
}

/// Evaluates a polynomial by Horner's rule with fused multiply-add, the highest coefficient first.
fn horner(x: f32, coefficients: &[f32]) -> f32 {
    coefficients.iter().copied().reduce(|y, c| y.mul_add(x, c)).unwrap_or_default()
}

/// ln of a normal number above 0: Cephes `logf`. `x = m · 2ᵉ` with m from √½ to √2, a polynomial in m − 1, and e ln 2
/// in two parts.
fn logarithm(x: f32) -> f32 {
    const POLYNOMIAL: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_84e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let mut exponent = (x.to_bits() >> 23).cast_signed() as f32 - 126.0;
    let mantissa = f32::from_bits((x.to_bits() & 0x007f_ffff) | 0x3f00_0000); // [½, 1)
    let m = if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        mantissa - 1.0 + mantissa
    } else {
        mantissa - 1.0
    };
    let square = m * m;
    let y = (horner(m, &POLYNOMIAL) * m).mul_add(square, exponent * LN2_LOW);
    let y = square.mul_add(-0.5, y);
    exponent.mul_add(LN2_HIGH, m + y)
}

/// Sine and cosine of an angle from 0 to 2π: Cephes `sinf` and `cosf`. The angle is reduced by a multiple of π/2, in three
/// parts, to at most π/4.
fn sine_and_cosine(angle: f32) -> (f32, f32) {
    const QUARTERS: [f32; 3] = [-0.785_156_25, -2.418_756_5e-4, -3.774_895e-8]; // -π/4
    const SINE: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];
    const COSINE: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];
    let eighths = ((angle * (4.0 / std::f32::consts::PI)) as u32 + 1) & !1;
    let x = QUARTERS.into_iter().fold(angle, |x, part| (eighths as f32).mul_add(part, x));
    let z = x * x;
    let sin = (horner(z, &SINE) * z).mul_add(x, x);
    let cos = (horner(z, &COSINE) * z).mul_add(z, -0.5 * z) + 1.0;
    match eighths & 7 {
        2 => (cos, -sin),
        4 => (-sin, -cos),
        6 => (-cos, sin),
        _ => (sin, cos),
    }
}

struct Mt19937 {
    state: [u32; Self::N],
    next: usize,
}

impl Mt19937 {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [0; Self::N];
        let mut last = seed;
        for (i, word) in (0u32..).zip(state.iter_mut()) {
            if i > 0 {
                last = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i);
            }
            *word = last;
        }
        Self { state, next: Self::N }
    }

    fn next(&mut self) -> u32 {
        if self.next == Self::N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..Self::N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

/// Philox4x32-10 as CUDA's `randn` uses it: the key is the seed, word 0 of the counter the number of draws made
/// before, word 2 the element.
struct Philox {
    seed: u64,
    draws: u32,
}

impl Philox {
    fn randn(&mut self, count: usize) -> Vec<f32> {
        let key = [(self.seed & 0xffff_ffff) as u32, (self.seed >> 32) as u32];
        let draws = self.draws;
        self.draws = draws.wrapping_add(1);
        (0..count as u64)
            .map(|element| {
                let [x, y, ..] = philox4x32_10([draws, 0, (element & 0xffff_ffff) as u32, (element >> 32) as u32], key);
                // f32 constants, as the kernel has them.
                let unit = f64::from(2.328_306_4e-10_f32);
                let angle_unit = f64::from(2.328_306_4e-10_f32 * std::f32::consts::TAU);
                let u = f64::from(x) * unit + unit / 2.0;
                let v = f64::from(y) * angle_unit + angle_unit / 2.0;
                ((-2.0 * u.ln()).sqrt() * v.sin()) as f32
            })
            .collect()
    }
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        let a = u64::from(c0) * 0xd251_1f53;
        let b = u64::from(c2) * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ c1 ^ key[0], b as u32, (a >> 32) as u32 ^ c3 ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}
