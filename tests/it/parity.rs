//! Text to image against diffusers, request by request. `tests/parity/make_cases.py` made the references from the
//! demonstration model in f32 on the CPU; `tests/parity/versions.json` names the versions.
//!
//! Three cases are chaotic: moving the noise by one unit in the last place moves diffusers' result by about the tolerance
//! or more (`tests/parity/spread.json`, by `tests/parity/make_spread.py`), and so does another CPU. For these the f64
//! result of diffusers is stored too. Ours must be within the tolerance of either, or at least as close to f64 as
//! diffusers' own f32 is.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use sdxl_worker::device::interface::{Dtype, Quantization};
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::inference::interface::GenerateRequest;

use super::drawing::{Worker, distance};

/// Largest difference of the latents, in units of the reference's standard deviation.
struct LatentTolerance(f64);
/// Lowest PSNR in dB over the 8-bit images.
struct LeastPsnr(f64);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity")
}

fn cases() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder())
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".request.json").map(str::to_owned))
        .collect();
    names.sort();
    names
}

fn request(case: &str) -> GenerateRequest {
    #[derive(serde::Deserialize)]
    struct Line {
        data: GenerateRequest,
    }
    let text = fs::read_to_string(folder().join(format!("{case}.request.json"))).unwrap();
    serde_json::from_str::<Line>(&text).unwrap().data
}

fn psnr(ours: &Rgb8, reference: &Path) -> f64 {
    let reference = image::open(reference).unwrap().to_rgb8();
    assert_eq!((ours.width, ours.height), (reference.width() as usize, reference.height() as usize));
    let total: f64 =
        ours.data.iter().zip(reference.as_raw()).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    let mse = total / ours.data.len() as f64;
    if mse == 0.0 { 99.0 } else { 10.0 * (255.0_f64.powi(2) / mse).log10() }
}

/// Runs `cases` in `precision`, prints the distance of each from the reference, and gives the PSNR of each image.
fn check(
    cases: &[String],
    (dtype, quantization): (Dtype, Quantization),
    latents: Option<LatentTolerance>,
    least: LeastPsnr,
) -> Vec<f64> {
    let mut worker = Worker::new();
    let (mut failures, mut all) = (Vec::new(), Vec::new());
    println!("{:<36} {:>13} {:>9} {:>9}", "case", "latents |Δ|/σ", "from f64", "PSNR dB");
    for case in cases {
        let mut request = request(case);
        (request.dtype, request.quantization) = (Some(dtype), Some(quantization));
        let stored =
            candle_core::safetensors::load(folder().join(format!("{case}.safetensors")), &Device::Cpu).unwrap();
        let drawn = worker.draw(&request);
        let single = drawn.len() == 1;
        for (index, (ours, pixels)) in drawn.iter().enumerate() {
            let reference = stored["latents"].narrow(0, index, 1).unwrap();
            let png = if single { format!("{case}.png") } else { format!("{case}-{index}.png") };
            let (distance, psnr) = (distance(ours, &reference), psnr(pixels, &folder().join(&png)));
            let exact = folder().join(format!("{case}.f64.safetensors"));
            let exact = exact.exists().then(|| candle_core::safetensors::load(exact, &Device::Cpu).unwrap());
            let from_exact = exact.as_ref().map(|exact| self::distance(ours, &exact["latents"]));
            let of_reference = exact.map_or(0.0, |exact| self::distance(&reference, &exact["latents"]));
            let shown = from_exact.map(|d| format!("{d:.2e}")).unwrap_or_default();
            println!("{png:<36} {distance:>13.2e} {shown:>9} {psnr:>9.1}");
            all.push(psnr);
            let within = |most: f64| distance <= most || from_exact.is_some_and(|d| d <= most || d <= of_reference);
            let far = latents.as_ref().is_some_and(|tolerance| !within(tolerance.0));
            if far || psnr.is_nan() || psnr < least.0 {
                failures.push(format!("{png}: latents {distance:.2e}, PSNR {psnr:.1} dB"));
            }
        }
    }
    assert!(failures.is_empty(), "out of tolerance:\n{}", failures.join("\n"));
    all
}

#[test]
fn every_case_equals_diffusers() {
    check(&cases(), (Dtype::F32, Quantization::None), Some(LatentTolerance(5e-4)), LeastPsnr(60.0));
}

#[test]
fn bf16_stays_close_to_the_f32_reference() {
    let some: Vec<String> =
        ["readme", "sampler-ddim", "sampler-dpmpp_2m", "negative", "wide"].map(str::to_owned).into();
    check(&some, (Dtype::Bf16, Quantization::None), None, LeastPsnr(34.0));
}

#[test]
fn int8_stays_close_to_the_f32_reference() {
    let some: Vec<String> =
        ["readme", "sampler-ddim", "sampler-dpmpp_2m", "negative", "wide"].map(str::to_owned).into();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let all = check(&some, (dtype, Quantization::Int8), None, LeastPsnr(25.0));
        assert!(all.iter().all(|psnr| *psnr < 50.0), "nothing was quantised: {all:?} dB");
    }
}

#[test]
fn batched_image_equals_the_image_alone() {
    let mut worker = Worker::new();
    let batch = GenerateRequest { steps: Some(3), ..request("batch") };
    let together = worker.draw(&batch);
    for (index, (_, pixels)) in together.iter().enumerate() {
        let seed = batch.seed.map(|seed| seed + index as i64);
        let alone = worker.draw(&GenerateRequest { seed, batch_size: Some(1), ..batch.clone() });
        assert_eq!(alone[0].1.data, pixels.data, "image {index}");
    }
}
