//! Every entry of the registries of samplers, preprocessors and upscalers has a golden: `tests/goldens/make_entries.py`,
//! `tests/goldens/make_schedules.py` or `tests/steer/make_hints.py`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use sdxl_worker::conditioning::PREPROCESSORS;
use sdxl_worker::conditioning::interface::PreprocessorParameters;
use sdxl_worker::conditioning::preprocessor::{ParameterValues, PreprocessTask};
use sdxl_worker::context::Context;
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::noise::{NoiseSource, RngKind};
use sdxl_worker::postprocessing::UPSCALERS;
use sdxl_worker::postprocessing::upscaler::{UpscaleMethod, UpscaleTask};
use sdxl_worker::scheduler::config::SchedulerConfig;
use sdxl_worker::scheduler::instructor::SchedulerInstructor;
use sdxl_worker::scheduler::interface::{SamplingOptions, Settings};
use sdxl_worker::scheduler::sampler::Model;
use sdxl_worker::scheduler::workers::SAMPLERS;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::scheduler::denoise;

/// Largest absolute error of a sampler's result, whose values are about 1.
const SAMPLER_TOLERANCE: f64 = 2e-5;
/// Largest absolute error of enlarged latents.
const LATENT_TOLERANCE: f64 = 2e-6;

fn goldens() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens"))
}

/// The names that have a golden of `kind` in `tests/goldens/entries`.
fn names(kind: &str) -> BTreeSet<String> {
    let files = fs::read_dir(goldens().join("entries")).unwrap();
    let names = files.filter_map(|file| {
        let file = file.unwrap().file_name().into_string().unwrap();
        file.strip_prefix(kind)?.strip_prefix('-')?.strip_suffix(".json").map(str::to_owned)
    });
    names.collect()
}

fn read<T: DeserializeOwned>(kind: &str, name: &str) -> T {
    let text = fs::read_to_string(goldens().join(format!("entries/{kind}-{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{kind}-{name}: {error}"))
}

#[track_caller]
fn check(name: &str, ours: &[f32], golden: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), golden.len(), "{name}");
    let error = ours.iter().zip(golden).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(error <= tolerance, "{name}: off by {error:.1e}, {tolerance:.1e} is allowed");
}

/// `[B, C, H, W]` values as `[B, H, W, C]`.
fn channels_last(values: &[f64], shape: (usize, usize, usize, usize)) -> Tensor {
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

fn channels_first(x: &Tensor) -> Vec<f32> {
    x.permute((0, 3, 1, 2)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[derive(Deserialize)]
struct SamplerGolden {
    schedule: String,
    steps: i64,
    noise: Vec<f64>,
    result: Vec<f64>,
}

#[test]
fn samplers_equal_their_goldens() {
    for name in names("sampler") {
        let golden: SamplerGolden = read("sampler", &name);
        let options = SamplingOptions {
            sampler_name: Some(name.clone()),
            scheduler: Some(golden.schedule),
            steps: Some(golden.steps),
            ..SamplingOptions::default()
        };
        let instructor = SchedulerInstructor::new(Settings::default()).unwrap();
        let plan = instructor.plan(&options, &SchedulerConfig::sdxl()).unwrap();
        let x = (channels_last(&golden.noise, (1, 4, 3, 3)) * plan.init_scale).unwrap();
        let (mut denoiser, mut on_step) = (|x: &Tensor, level| Ok(denoise(&plan, x, level)), |_, x, _: &Tensor| Ok(x));
        let mut noise = NoiseSource::new(RngKind::Cpu, &[0], 4, 3, 3, &Device::Cpu);
        let ctx = Context::detached();
        let mut model = Model::new(&mut denoiser, &mut on_step, &mut noise, &ctx);
        let x = SAMPLERS.get(&name).unwrap().sample(&plan, x, &mut model).unwrap();
        check(&name, &channels_first(&x), &golden.result, SAMPLER_TOLERANCE);
    }
}

#[derive(Deserialize)]
struct PreprocessorGolden {
    parameters: PreprocessorParameters,
    width: usize,
    height: usize,
    image: Vec<u8>,
    result: Vec<u8>,
}

#[test]
fn preprocessors_equal_their_goldens() {
    for name in names("preprocessor") {
        let PreprocessorGolden { parameters, width, height, image, result } = read("preprocessor", &name);
        let preprocessor = PREPROCESSORS.get(&name).unwrap();
        let parameters = ParameterValues::resolve(&name, preprocessor.parameters(), &parameters, "parameters").unwrap();
        let image = Rgb8 { width, height, data: image };
        let task = PreprocessTask { image: &image, parameters: &parameters };
        let hint = Context::detached().perform(preprocessor, task).unwrap();
        assert_eq!(hint.data, result, "{name}");
    }
}

#[derive(Deserialize)]
struct UpscalerGolden {
    image_width: usize,
    image_height: usize,
    image: Vec<f64>,
    width: usize,
    height: usize,
    result: Vec<f64>,
}

#[test]
fn upscalers_equal_their_goldens() {
    for name in names("upscaler") {
        let golden: UpscalerGolden = read("upscaler", &name);
        let (width, height) = (golden.width, golden.height);
        match UPSCALERS.get(&name).unwrap().method {
            UpscaleMethod::Latents(upscaler) => {
                let image = channels_last(&golden.image, (1, 4, golden.image_height, golden.image_width));
                let task = UpscaleTask { image: &image, width, height };
                let enlarged = Context::detached().perform(upscaler, task).unwrap();
                check(&name, &channels_first(&enlarged), &golden.result, LATENT_TOLERANCE);
            }
            UpscaleMethod::Pixels(upscaler) => {
                let data = golden.image.iter().map(|v| *v as u8).collect();
                let image = Rgb8 { width: golden.image_width, height: golden.image_height, data };
                let task = UpscaleTask { image: &image, width, height };
                let enlarged = Context::detached().perform(upscaler, task).unwrap();
                let bytes: Vec<f32> = enlarged.data.iter().map(|v| f32::from(*v)).collect();
                check(&name, &bytes, &golden.result, 0.0);
            }
        }
    }
}

#[test]
fn every_entry_has_a_golden() {
    #[derive(Deserialize)]
    struct Runs {
        runs: Vec<Run>,
    }
    #[derive(Deserialize)]
    struct Run {
        sampler: String,
    }
    let runs: Runs = serde_json::from_str(&fs::read_to_string(goldens().join("schedules.json")).unwrap()).unwrap();
    let hints = goldens().join("../steer/hints.safetensors");
    let hints = candle_core::safetensors::load(hints, &Device::Cpu).unwrap();
    let mut samplers = names("sampler");
    samplers.extend(runs.runs.into_iter().map(|run| run.sampler));
    let mut preprocessors = names("preprocessor");
    preprocessors.extend(hints.keys().filter_map(|key| key.split('.').nth(1).map(str::to_owned)));
    let kinds = [
        ("sampler", samplers, SAMPLERS.names().collect::<Vec<_>>()),
        ("preprocessor", preprocessors, PREPROCESSORS.names().collect()),
        ("upscaler", names("upscaler"), UPSCALERS.names().collect()),
    ];
    for (kind, golden, known) in kinds {
        let missing: Vec<_> = known.into_iter().filter(|name| !golden.contains(*name)).collect();
        assert!(missing.is_empty(), "no golden for the {kind} {missing:?}: add it to tests/goldens/make_entries.py");
    }
}
