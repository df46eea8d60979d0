//! Noise against what torch draws: tests/goldens/make_noise.py.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use candle_core::{Device, Tensor};
use sdxl_worker::noise::{NoiseSource, RngKind};

/// Largest difference from the golden. torch's vectorised logarithm and cosine differ from the scalar ones by a few
/// units in the last place, and values reach 5.
const TOLERANCE: f32 = 2e-6;

fn check(kind: RngKind, seed: u64, shape: (usize, usize, usize), draw: usize, noise: &Tensor, golden: &Tensor) -> f32 {
    let noise = noise.permute((0, 3, 1, 2)).unwrap();
    assert_eq!(noise.dims(), golden.dims(), "{kind:?} {seed} {shape:?}");
    let difference = (noise - golden).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference <= TOLERANCE, "{kind:?}, seed {seed}, {shape:?}, draw {draw}: off by {difference:e}");
    difference
}

#[test]
fn noise_equals_torch_draw_by_draw() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/noise.safetensors");
    let goldens = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let (mut compared, mut worst) = (0, 0f32);
    for name in goldens.keys().filter(|name| name.ends_with(".0")) {
        let parts: Vec<&str> = name.split('.').collect();
        let kind = if parts[0] == "cpu" { RngKind::Cpu } else { RngKind::Nv };
        let seed: u64 = parts[1].parse().unwrap();
        let sides: Vec<usize> = parts[2].split('x').map(|side| side.parse().unwrap()).collect();
        let mut source = NoiseSource::new(kind, &[seed], sides[0], sides[1], sides[2], &Device::Cpu);
        for draw in 0..3 {
            let golden = &goldens[&format!("{}.{}.{}.{draw}", parts[0], parts[1], parts[2])];
            let noise = source.draw().unwrap();
            worst = worst.max(check(kind, seed, (sides[0], sides[1], sides[2]), draw, &noise, golden));
            compared += 1;
        }
    }
    println!("{compared} draws, worst difference {worst:e}");
    assert_eq!(compared, goldens.len());
}

#[test]
fn an_image_has_the_same_noise_in_any_batch() {
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
