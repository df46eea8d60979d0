//! Noise, compared with torch: `tests/goldens/make_noise.py`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use sdxl_worker::noise::{NoiseSource, RngKind};

/// Largest difference of `nv` noise from the golden. `cpu` noise has none.
const NV_TOLERANCE: f32 = 2e-6;

fn goldens() -> HashMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/noise.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// A golden's seed and C, H, W: the second and third part of its name.
fn seed_and_shape(name: &str) -> (u64, Vec<usize>) {
    let parts: Vec<&str> = name.split('.').collect();
    (parts[1].parse().unwrap(), parts[2].split('x').map(|side| side.parse().unwrap()).collect())
}

/// The next draw in torch's layout, `[1, C, H, W]`.
fn planes(source: &mut NoiseSource) -> Vec<f32> {
    source.draw().unwrap().permute((0, 3, 1, 2)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn check(kind: RngKind, what: &str, noise: &[f32], golden: &Tensor) -> f32 {
    let golden: Vec<f32> = golden.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(noise.len(), golden.len(), "{what}");
    let pairs = || noise.iter().zip(&golden);
    let worst = pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let unequal = pairs().filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    match kind {
        RngKind::Cpu => assert!(unequal == 0, "{what}: {unequal} of {} unequal, by up to {worst:e}", noise.len()),
        RngKind::Nv => assert!(worst <= NV_TOLERANCE, "{what}: off by {worst:e}"),
    }
    worst
}

#[test]
fn noise_equals_torch_draw_by_draw() {
    let goldens = goldens();
    let (mut compared, mut worst) = (0, 0f32);
    for name in goldens.keys().filter(|name| name.ends_with(".0")) {
        let kind = if name.starts_with("cpu.") { RngKind::Cpu } else { RngKind::Nv };
        let (seed, sides) = seed_and_shape(name);
        let mut source = NoiseSource::new(kind, &[seed], sides[0], sides[1], sides[2], &Device::Cpu);
        for draw in 0..3 {
            let name = format!("{}{draw}", name.strip_suffix('0').unwrap());
            worst = worst.max(check(kind, &name, &planes(&mut source), &goldens[&name]));
            compared += 1;
        }
    }
    println!("{compared} draws, worst difference {worst:e}");
    assert_eq!(compared, goldens.keys().filter(|name| !name.starts_with("sum.")).count());
}

#[test]
fn large_draws_equal_torch_bit_for_bit() {
    for (name, sums) in goldens().iter().filter(|(name, _)| name.starts_with("sum.")) {
        let (seed, sides) = seed_and_shape(name);
        let mut source = NoiseSource::new(RngKind::Cpu, &[seed], sides[0], sides[1], sides[2], &Device::Cpu);
        for (draw, sum) in sums.to_vec1::<i64>().unwrap().into_iter().enumerate() {
            let ours = planes(&mut source)
                .iter()
                .zip(0u64..)
                .fold(0u64, |sum, (x, i)| sum.wrapping_add(u64::from(x.to_bits()).wrapping_mul(2 * i + 1)));
            assert_eq!(ours, sum.cast_unsigned(), "{name}, draw {draw}");
        }
    }
}

#[test]
fn noise_is_independent_of_the_batch() {
    for kind in [RngKind::Cpu, RngKind::Nv] {
        let mut batch = NoiseSource::new(kind, &[7, 8, 9], 4, 6, 5, &Device::Cpu);
        let mut alone = NoiseSource::new(kind, &[8], 4, 6, 5, &Device::Cpu);
        for _ in 0..3 {
            let (batch, alone) = (batch.draw().unwrap(), alone.draw().unwrap());
            assert_eq!(batch.dims(), [3, 6, 5, 4]);
            let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(batch.narrow(0, 1, 1).unwrap()), flat(alone), "{kind:?}");
        }
    }
}
