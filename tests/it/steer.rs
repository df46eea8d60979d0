//! Conditioning and guidance modes against the reference. `tests/steer/*.json` hold requests by mode, and each names the
//! script that made its golden latents. Latents must agree to 1e-3 of their standard deviation.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::noise::{NoiseSource, RngKind};
use sdxl_worker::runtime::config::Config;

use super::drawing::{Worker, distance};
use super::random_networks::{self, Layout};

/// Largest difference of the latents, in units of the reference's standard deviation.
const TOLERANCE: f64 = 1e-3;

/// The samplers that every mode is compared with.
const SAMPLERS: [&str; 4] = ["ddim", "euler", "dpmpp_2m", "euler_ancestral"];

/// Distances by mode, case (without its sampler) and sampler.
type Matrix = BTreeMap<(String, String), BTreeMap<String, f64>>;

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

/// Models derived from the demonstration model: the UNet of `inpaint9` has five more input channels, with weights drawn
/// from the same seed as in the goldens' script.
fn models() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let inpaint = root.path().join("inpaint9");
    copy(&demo, &inpaint);
    let config = inpaint.join("unet/config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"in_channels\": 4"), "{text}");
    fs::write(&config, text.replace("\"in_channels\": 4", "\"in_channels\": 9")).unwrap();
    let file = inpaint.join("unet/diffusion_pytorch_model.safetensors");
    let mut weights = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let first = weights["conv_in.weight"].to_dtype(DType::F32).unwrap();
    let outputs = first.dim(0).unwrap();
    let mut noise = NoiseSource::new(RngKind::Cpu, &[9], 5, outputs, 9, &Device::Cpu);
    let more = noise.draw().unwrap().squeeze(0).unwrap(); // [outputs, 9, 5]
    let more = more.permute((0, 2, 1)).unwrap().contiguous().unwrap().reshape((outputs, 5, 3, 3)).unwrap();
    let wide = Tensor::cat(&[&first, &(more * 0.05).unwrap()], 1).unwrap();
    weights.insert("conv_in.weight".to_owned(), wide);
    candle_core::safetensors::save(&weights, &file).unwrap();
    refiner(&demo, root.path());
    root
}

/// `refiner`: the second text encoder alone, and a random UNet conditioned on aesthetic scores.
fn refiner(demo: &Path, root: &Path) {
    let folder = root.join("refiner");
    for part in ["text_encoder_2", "vae", "scheduler"] {
        copy(&demo.join(part), &folder.join(part));
    }
    Layout::read(&self::folder().join("refiner/unet.json")).write(&folder, "unet");
    let index = r#"{"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": true,
        "force_zeros_for_empty_prompt": false, "text_encoder": [null, null], "tokenizer": [null, null],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"]}"#;
    fs::write(folder.join("model_index.json"), index).unwrap();
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// The cases of a file, and the distance of each from its golden.
fn check(file: &Path, models: &Path, matrix: &mut Matrix) -> Vec<String> {
    let mode: Mode = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let goldens = candle_core::safetensors::load(file.with_extension("safetensors"), &Device::Cpu).unwrap();
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![
        folder().join("models"),
        models.to_owned(),
        random_networks::folder().to_owned(),
        super::adapters::networks(),
    ];
    config.workers.instructors.postprocessing.roots = vec![folder()];
    let mut worker = Worker::with(&config);
    let mut failures = Vec::new();
    for (name, request) in mode.cases {
        let request = GenerateRequest { dtype: Some(Dtype::F32), ..request };
        let golden = &goldens[&name];
        for (index, (ours, _)) in worker.draw(&request).iter().enumerate() {
            let distance = distance(ours, &golden.narrow(0, index, 1).unwrap());
            println!("{:<24} {name:<32} {distance:>9.2e}", mode.mode);
            let sampler = request.sampler_name.clone().unwrap_or_default();
            let row = name.replace(&sampler, "").trim_matches([' ', '-', ',']).to_owned();
            let worst = matrix.entry((mode.mode.clone(), row)).or_default().entry(sampler).or_insert(0.0);
            *worst = distance.max(*worst);
            if distance.is_nan() || distance > TOLERANCE {
                failures.push(format!("{} {name} image {index}: {distance:.2e}", mode.mode));
            }
        }
    }
    failures
}

#[test]
fn every_mode_equals_its_reference() {
    let mut files: Vec<PathBuf> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "json"));
    files.sort();
    println!("{:<24} {:<32} {:>9}", "mode", "case", "|Δ|/σ");
    let models = models();
    let mut matrix = Matrix::new();
    let failures: Vec<String> = files.iter().flat_map(|file| check(file, models.path(), &mut matrix)).collect();
    println!("\n{:<48} {}", "mode", SAMPLERS.map(|sampler| format!("{sampler:>16}")).concat());
    let all = |row: &&BTreeMap<String, f64>| SAMPLERS.iter().all(|sampler| row.contains_key(*sampler));
    for ((mode, case), row) in matrix.iter().filter(|(_, row)| all(row)) {
        let cells = SAMPLERS.map(|sampler| format!("{:>16.1e}", row[sampler]));
        println!("{:<48} {}", format!("{mode} {case}"), cells.concat());
    }
    let whole: BTreeSet<&str> = matrix.iter().filter(|(_, row)| all(row)).map(|((mode, _), _)| mode.as_str()).collect();
    let modes: BTreeSet<&str> = matrix.keys().map(|(mode, _)| mode.as_str()).collect();
    assert_eq!(whole, modes, "a mode is not compared with every sampler");
    assert!(failures.is_empty(), "out of tolerance:\n{}", failures.join("\n"));
}
