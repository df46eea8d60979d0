//! Every instruction set of the CPU kernels, chosen by `--cpu-features`, each in its own process. Sets that this machine
//! lacks are printed as not run.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::path::Path;

use sdxl_worker::kernels::simd::{self, SimdLevel};
use serde_json::{Value, json};

use crate::wire::Worker;

/// Lowest PSNR in dB over the 8-bit images.
struct LeastPsnr(f64);

/// One image of the demonstration model, made with `level`.
fn draw(level: SimdLevel, dtype: &str) -> image::RgbImage {
    let mut worker = Worker::start(&["--cpu-features", level.name(), "--device", "cpu"]);
    assert_eq!(worker.ask("h", "hello", &json!({}))["cpu_features"], level.name());
    worker.send(&json!({
        "request_id": "r", "prompt": "A sunset over mountains", "seed": 42, "steps": 6, "width": 128, "height": 128,
        "dtype": dtype, "output": { "path": "r.png" },
    }));
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    assert_eq!((lines.len(), exit), (1, Some(0)), "{lines:?}");
    assert_eq!(lines[0]["success"], true, "{}", lines[0]);
    image::open(worker.folder.path().join(path(&lines[0]))).unwrap().to_rgb8()
}

fn path(line: &Value) -> &Path {
    Path::new(line["data"]["images"][0]["path"].as_str().unwrap())
}

fn psnr(ours: &image::RgbImage, reference: &image::RgbImage) -> f64 {
    assert_eq!(ours.dimensions(), reference.dimensions());
    let square = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
    let mean = ours.iter().zip(reference.iter()).map(square).sum::<f64>() / ours.len() as f64;
    if mean == 0.0 { 99.0 } else { 10.0 * (255.0 * 255.0 / mean).log10() }
}

/// PSNR of the image in `dtype` against the portable f32 image.
fn check(dtype: &str, least: &LeastPsnr) {
    let reference = draw(SimdLevel::Portable, "f32");
    for level in SimdLevel::ALL {
        if !level.is_supported() {
            println!("{:<12} {dtype}: NOT RUN, this machine does not have it", level.name());
            continue;
        }
        let likeness = psnr(&draw(level, dtype), &reference);
        println!("{:<12} {dtype}: {likeness:.1} dB from f32, at least {} wanted", level.name(), least.0);
        assert!(likeness >= least.0, "{} in {dtype}: {likeness:.1} dB, at least {} wanted", level.name(), least.0);
    }
}

#[test]
fn bf16_is_close_to_f32_with_every_instruction_set() {
    check("bf16", &LeastPsnr(34.0));
}

#[test]
fn f32_gives_the_same_picture_with_every_instruction_set() {
    check("f32", &LeastPsnr(60.0));
}

#[test]
fn absent_instruction_set_fails_the_start_and_names_the_present_ones() {
    let Some(absent) = SimdLevel::ALL.into_iter().find(|level| !level.is_supported()) else {
        println!("NOT RUN: this machine has every instruction set");
        return;
    };
    let mut worker = Worker::start(&["--cpu-features", absent.name()]);
    worker.close_stdin();
    assert_eq!(worker.rest(), (vec![], Some(69)));
    let log = worker.stderr();
    assert!(log.contains(&format!("got `{}`", absent.name())), "{log}");
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_supported()) {
        assert!(log.contains(&format!("`{}`", level.name())), "{} is not in {log}", level.name());
    }
}

#[test]
fn unknown_instruction_set_is_a_usage_error() {
    let mut worker = Worker::start(&["--cpu-features", "axm"]);
    worker.close_stdin();
    assert_eq!(worker.rest(), (vec![], Some(64)));
    assert!(worker.stderr().contains("avx512-bf16"));
}

#[test]
fn default_instruction_set_is_the_fastest_and_reported() {
    let mut worker = Worker::start(&[]);
    assert_eq!(worker.ask("h", "hello", &json!({}))["cpu_features"], simd::best().name());
    worker.send(&json!({ "request_id": "i", "worker_type": "device", "operation": "info" }));
    assert_eq!(worker.answer("i")["data"]["cpu"]["cpu_features"], simd::best().name());
    worker.close_stdin();
    assert_eq!(worker.rest(), (vec![], Some(0)));
    let log = worker.stderr();
    assert!(log.contains(simd::best().name()), "{log}");
}
