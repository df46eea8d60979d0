//! EDM models and instruct-pix2pix against diffusers: `tests/variants/*.json` hold requests, and each names the script
//! that made its golden latents.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::error::Error;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::noise::{NoiseSource, RngKind};
use sdxl_worker::runtime::config::Config;

use super::conditioning::demo_folder;
use super::drawing::{Worker, distance};
use super::single_file::single;

/// Largest difference of the latents, in units of the reference's standard deviation.
const TOLERANCE: f64 = 1e-3;

#[derive(serde::Deserialize)]
struct Goldens {
    /// The script and the versions that made the goldens.
    #[serde(rename = "made_by")]
    _made_by: String,
    cases: BTreeMap<String, GenerateRequest>,
    /// Keys of the scheduler's configuration, by model.
    #[serde(default)]
    schedulers: BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
}

fn open(name: &str) -> (Goldens, std::collections::HashMap<String, Tensor>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/variants").join(name);
    let goldens = serde_json::from_str(&fs::read_to_string(path.with_extension("json")).unwrap()).unwrap();
    (goldens, candle_core::safetensors::load(path.with_extension("safetensors"), &Device::Cpu).unwrap())
}

fn worker(root: &Path) -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![root.to_owned()];
    config.workers.instructors.postprocessing.roots =
        vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/steer")];
    Worker::with(&config)
}

fn check(name: &str, root: &Path) {
    let (goldens, latents) = open(name);
    let mut worker = worker(root);
    let mut failures = Vec::new();
    for (case, request) in goldens.cases {
        for slice in [false, true] {
            let request = GenerateRequest { dtype: Some(Dtype::F32), slice: Some(slice), ..request.clone() };
            let (ours, _) = worker.draw(&request).remove(0);
            let distance = distance(&ours, &latents[&case]);
            println!("{name} {case:<40} {distance:>9.2e}{}", if slice { ", in slices" } else { "" });
            if distance.is_nan() || distance > TOLERANCE {
                failures.push(format!("{case}, slice {slice}: {distance:.2e}"));
            }
        }
    }
    assert!(failures.is_empty(), "out of tolerance:\n{}", failures.join("\n"));
}

/// The demonstration model with each of the goldens' schedulers.
fn edm_models() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, mut options) in open("edm").0.schedulers {
        demo_folder(&root.path().join(&name));
        options.insert("_class_name".to_owned(), "EDMEulerScheduler".into());
        let config = serde_json::to_string(&options).unwrap();
        fs::write(root.path().join(&name).join("scheduler/scheduler_config.json"), config).unwrap();
    }
    root
}

#[test]
fn edm_models_equal_diffusers() {
    check("edm", edm_models().path());
}

#[test]
fn marker_tensors_equal_a_folders_scheduler() {
    let root = edm_models();
    let folder = root.path().join("edm_v");
    let mut file = single(&folder, 1);
    file.metadata.remove("config.scheduler");
    let number = |value: f32| ("F32".to_owned(), vec![], value.to_le_bytes().to_vec());
    file.tensors.insert("edm_vpred.sigma_max".to_owned(), number(120.0));
    file.tensors.insert("edm_vpred.sigma_min".to_owned(), number(0.002));
    file.write(&root.path().join("marked.safetensors"));
    let mut worker = worker(root.path());
    let request = |model: &str| GenerateRequest {
        prompt: Some("a lake".to_owned()),
        model: Some(model.to_owned()),
        sampler_name: Some("euler".to_owned()),
        steps: Some(4),
        width: Some(64),
        height: Some(64),
        seed: Some(1),
        ..GenerateRequest::default()
    };
    let bits = |latents: &Tensor| latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (folder, marked) = (worker.draw(&request("edm_v")).remove(0), worker.draw(&request("marked")).remove(0));
    // The file's lowest σ has 24 bits.
    let far = distance(&marked.0, &folder.0);
    assert!(far < 1e-5, "{far}: {:?}", &bits(&folder.0)[..4]);
    let plan = worker.instructors.inference.plan(&request("marked"), &mut worker.managers).unwrap();
    assert_eq!(GenerateRequest::from(&plan).scheduler.as_deref(), Some("exponential"));

    let mut refused = |change: &dyn Fn(&mut GenerateRequest), expected: &str| {
        let mut request = request("edm_v");
        change(&mut request);
        match worker.instructors.inference.plan(&request, &mut worker.managers) {
            Err(Error::InvalidParameter { field, message, .. }) => assert_eq!(field, expected, "{message}"),
            Err(error) => panic!("{expected}: {error}"),
            Ok(_) => panic!("{expected} was not refused"),
        }
    };
    refused(&|r| r.scheduler = Some("leading".to_owned()), "scheduler");
    refused(&|r| r.sampler_name = Some("lcm".to_owned()), "sampler_name");
    refused(
        &|r| {
            r.steps = None;
            r.timesteps = Some(vec![900.0, 500.0]);
        },
        "timesteps",
    );
    refused(&|r| r.zero_terminal_snr = Some(true), "zero_terminal_snr");
    refused(&|r| r.image_guidance_scale = Some(1.5), "image_guidance_scale");
    // Shares count steps for EDM models: half of them are done.
    let half = GenerateRequest { denoising_end: Some(0.5), ..request("edm_v") };
    let plan = worker.instructors.inference.plan(&half, &mut worker.managers).unwrap();
    assert_eq!(plan.steps(), 2);
}

/// `edit` and `edit_scaled`: the demonstration model with four more input channels, drawn as in the goldens' script.
fn editors() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, scaled) in [("edit", false), ("edit_scaled", true)] {
        let folder = root.path().join(name);
        demo_folder(&folder);
        let replace = |file: &str, from: &str, to: &str| {
            let text = fs::read_to_string(folder.join(file)).unwrap();
            assert!(text.contains(from), "{text}");
            fs::write(folder.join(file), text.replace(from, to)).unwrap();
        };
        replace("unet/config.json", "\"in_channels\": 4", "\"in_channels\": 8");
        let class = format!("StableDiffusionXLInstructPix2PixPipeline\",\n \"is_cosxl_edit\": {scaled},\n \"x\": \"");
        replace("model_index.json", "StableDiffusionXLPipeline", &class);
        let file = folder.join("unet/diffusion_pytorch_model.safetensors");
        let mut weights = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let first = weights["conv_in.weight"].to_dtype(DType::F32).unwrap();
        let outputs = first.dim(0).unwrap();
        let more = NoiseSource::new(RngKind::Cpu, &[8], 4, outputs, 9, &Device::Cpu).draw().unwrap(); // [1, outputs, 9, 4]
        let more = more.squeeze(0).unwrap().permute((0, 2, 1)).unwrap().contiguous().unwrap();
        let more = (more.reshape((outputs, 4, 3, 3)).unwrap() * 0.05).unwrap();
        weights.insert("conv_in.weight".to_owned(), Tensor::cat(&[&first, &more], 1).unwrap());
        candle_core::safetensors::save(&weights, &file).unwrap();
    }
    root
}

#[test]
fn instruct_pix2pix_equals_diffusers() {
    let root = editors();
    check("edits", root.path());
    let mut worker = worker(root.path());
    let (goldens, _) = open("edits");
    let any = goldens.cases.into_values().next().unwrap();
    let mut refused = |change: &dyn Fn(&mut GenerateRequest), code: &str, field: &str| {
        let mut request = any.clone();
        change(&mut request);
        let Err(error) = worker.instructors.inference.plan(&request, &mut worker.managers) else { panic!("{field}") };
        assert_eq!((error.code(), error.pointer()), (code, Some(format!("/data/{field}"))), "{error}");
    };
    refused(&|r| r.init_image = None, "invalid_parameter", "init_image");
    refused(&|r| r.denoising_strength = Some(0.5), "invalid_parameter", "denoising_strength");
    refused(&|r| r.image_guidance_scale = Some(0.5), "invalid_parameter", "image_guidance_scale");
    refused(&|r| r.mask = r.init_image.clone(), "unsupported_feature", "mask");
    refused(&|r| r.enable_hr = Some(true), "unsupported_feature", "enable_hr");
    let plan = worker.instructors.inference.plan(&any, &mut worker.managers).unwrap();
    let echo = GenerateRequest::from(&plan);
    assert_eq!(echo.denoising_strength, None);
    assert_eq!(echo.image_guidance_scale, any.image_guidance_scale);
}
