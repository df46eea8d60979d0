//! Everything that steers an image, against the reference: `tests/steer/*.json` hold requests by mode, made with their
//! golden latents by the script that each names. Latents must agree to 1e-3 of their standard deviation.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use sdxl_worker::config::Config;
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::inference::interface::GenerateRequest;

use super::drawing::{Worker, distance};

/// Largest difference of the latents, in units of the reference's standard deviation.
const TOLERANCE: f64 = 1e-3;

#[derive(serde::Deserialize)]
struct Mode {
    mode: String,
    /// The script and the versions that made the goldens.
    #[serde(rename = "made_by")]
    _made_by: String,
    /// By name; the golden of the same name is `[B, C, H, W]`.
    cases: BTreeMap<String, GenerateRequest>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer")
}

/// Every case of a file, and how far each is from its golden.
fn check(file: &Path) -> Vec<String> {
    let mode: Mode = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let goldens = candle_core::safetensors::load(file.with_extension("safetensors"), &Device::Cpu).unwrap();
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![folder().join("models"), super::adapters::networks()];
    config.workers.instructors.postprocessing.roots = vec![folder()];
    let mut worker = Worker::with(&config);
    let mut failures = Vec::new();
    for (name, request) in mode.cases {
        let request = GenerateRequest { dtype: Some(Dtype::F32), ..request };
        let golden = &goldens[&name];
        for (index, (ours, _)) in worker.draw(&request).iter().enumerate() {
            let distance = distance(ours, &golden.narrow(0, index, 1).unwrap());
            println!("{:<24} {name:<32} {distance:>9.2e}", mode.mode);
            if distance.is_nan() || distance > TOLERANCE {
                failures.push(format!("{} {name} image {index}: {distance:.2e}", mode.mode));
            }
        }
    }
    failures
}

#[test]
fn every_mode_is_what_the_reference_draws() {
    let mut files: Vec<PathBuf> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "json"));
    files.sort();
    println!("{:<24} {:<32} {:>9}", "mode", "case", "|Δ|/σ");
    let failures: Vec<String> = files.iter().flat_map(|file| check(file)).collect();
    assert!(failures.is_empty(), "out of tolerance:\n{}", failures.join("\n"));
}
