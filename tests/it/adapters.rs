//! T2I-Adapter and IP-Adapter: networks and image preprocessing against the reference, and the errors of unusable files.
//! `tests/steer/make_adapters.py` makes the goldens and the recipes of the random networks; `tests/it/steer.rs` compares
//! the latents.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use sdxl_worker::conditioning::clip_pixels;
use sdxl_worker::conditioning::image_adapters::AdaptTask;
use sdxl_worker::context::Context;
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::error::Error;
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::image::resample::Filter;
use sdxl_worker::image::source::ImageSource;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::kernels::Loader;
use sdxl_worker::model::networks::clip_vision::{ClipVision, ClipVisionConfig, Seen};
use sdxl_worker::model::networks::ip_adapter::{IpAdapter, IpAdapterLayout};
use sdxl_worker::model::networks::t2i_adapter::{T2iAdapter, T2iAdapterConfig};
use sdxl_worker::noise::{NoiseSource, RngKind};
use sdxl_worker::roots::Roots;
use sdxl_worker::runtime::config::Config;
use serde_json::{Value, json};

use super::drawing::{Worker, distance, latents};

/// Largest error of a network, relative to its largest value.
const TOLERANCE: f64 = 1e-4;

#[derive(serde::Deserialize)]
struct Recipe {
    tensors: Vec<Ingredient>,
    config: Option<Value>,
}

/// `torch.randn` by `seed`, times `scale`, plus `shift`.
#[derive(serde::Deserialize)]
struct Ingredient {
    name: String,
    shape: Vec<usize>,
    seed: u64,
    scale: f64,
    shift: f64,
}

fn steer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer")
}

/// A folder with the random networks, made from their recipes on first use.
pub(crate) fn networks() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(make_networks).clone()
}

fn make_networks() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("adapters");
    let recipes: BTreeMap<String, Recipe> =
        serde_json::from_str(&fs::read_to_string(steer().join("adapters/networks.json")).unwrap()).unwrap();
    for (file, recipe) in recipes {
        let path = folder.join(file);
        let parent = path.parent().unwrap();
        fs::create_dir_all(parent).unwrap();
        if let Some(config) = recipe.config {
            fs::write(parent.join("config.json"), config.to_string()).unwrap();
        }
        let tensors: HashMap<String, Tensor> =
            recipe.tensors.iter().map(|one| (one.name.clone(), one.make())).collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
    }
    folder
}

impl Ingredient {
    fn make(&self) -> Tensor {
        let count = self.shape.iter().product();
        let mut noise = NoiseSource::new(RngKind::Cpu, &[self.seed], 1, 1, count, &Device::Cpu);
        let drawn = noise.draw().unwrap().reshape(self.shape.as_slice()).unwrap();
        drawn.affine(self.scale, self.shift).unwrap()
    }
}

fn units() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(steer().join("adapters/units.safetensors"), &Device::Cpu).unwrap()
}

fn weights(file: &str) -> Loader<'static> {
    let bytes = fs::read(networks().join(file)).unwrap();
    VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap().into()
}

fn config<T: serde::de::DeserializeOwned>(folder: &str) -> T {
    serde_json::from_str(&fs::read_to_string(networks().join(folder).join("config.json")).unwrap()).unwrap()
}

fn picture(name: &str) -> Rgb8 {
    let source = ImageSource::Path(steer().join(format!("files/{name}.png")));
    source.read(&Roots::new([steer()]), "image").unwrap().decode().unwrap()
}

/// `[B, H, W, C]` to `[B, C, H, W]`.
fn nchw(x: &Tensor) -> Tensor {
    x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap()
}

#[track_caller]
fn check_close(what: &str, ours: &Tensor, golden: &Tensor, tolerance: f64) {
    assert_eq!(ours.dims(), golden.dims(), "{what}");
    let largest = |x: &Tensor| f64::from(x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap());
    let error = largest(&(ours - golden).unwrap()) / largest(golden);
    println!("{what:28} relative error {error:.1e}, allowed {tolerance:.0e}");
    assert!(error <= tolerance, "{what}: {error:.1e}");
}

#[test]
fn clip_preprocessing_equals_transformers() {
    let golden = units();
    for name in ["adapter_wide", "adapter_tall"] {
        let small = nchw(&clip_pixels(&picture(name), 64).unwrap());
        check_close(&format!("{name} at 64"), &small, &golden[&format!("{name}.pixels")], 1e-6);
        // The golden has every seventh pixel of the large picture.
        let large = nchw(&clip_pixels(&picture(name), 224).unwrap());
        let every = Tensor::from_vec((0..224u32).step_by(7).collect(), 32, &Device::Cpu).unwrap();
        let large = large.index_select(&every, 2).unwrap().index_select(&every, 3).unwrap();
        check_close(&format!("{name} at 224"), &large, &golden[&format!("{name}.large")], 1e-6);
    }
}

#[test]
fn image_encoder_equals_transformers() {
    let golden = units();
    let config: ClipVisionConfig = config("ip/encoder");
    let encoder = ClipVision::load(&weights("ip/encoder/model.safetensors"), &config).unwrap();
    for name in ["adapter_wide", "adapter_tall"] {
        let pixels = golden[&format!("{name}.pixels")].permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
        for (seen, what) in [(Seen::Whole, "whole"), (Seen::Patches, "patches")] {
            let ours = encoder.forward(&pixels, seen, &|| Ok(())).unwrap();
            check_close(&format!("{name} {what}"), &ours, &golden[&format!("{name}.{what}")], TOLERANCE);
        }
    }
}

#[test]
fn image_tokens_equal_diffusers() {
    let golden = units();
    for (kind, seen) in [("plain", "adapter_wide.whole"), ("plus", "adapter_tall.patches")] {
        let layout = layout(&format!("ip/{kind}.safetensors")).unwrap();
        let adapter = IpAdapter::load(&weights(&format!("ip/{kind}.safetensors")), &layout).unwrap();
        let tokens = adapter.project(&golden[seen]).unwrap();
        check_close(&format!("{kind} tokens"), &tokens, &golden[&format!("{kind}.tokens")], TOLERANCE);
    }
}

#[test]
fn t2i_adapter_features_equal_diffusers_at_odd_sizes() {
    let golden = units();
    let wide = picture("adapter_wide");
    for (name, channels) in [("outline", 3), ("sketch", 1)] {
        let config: T2iAdapterConfig = config(&format!("t2i/{name}"));
        let loader = weights(&format!("t2i/{name}/diffusion_pytorch_model.safetensors"));
        let adapter = T2iAdapter::load(&loader, &config).unwrap();
        let shown = if channels == 1 { wide.to_gray().to_rgb() } else { wide.clone() };
        let shown = shown.resized(144, 112, Filter::Lanczos).unwrap();
        let bytes = shown.data.iter().step_by(if channels == 1 { 3 } else { 1 });
        let values: Vec<f32> = bytes.map(|&byte| f32::from(byte) / 255.0).collect();
        let shown = Tensor::from_vec(values, (1, 112, 144, channels), &Device::Cpu).unwrap();
        let features = adapter.forward(&shown, &|| Ok(())).unwrap();
        assert_eq!(features.len(), config.channels.len());
        for (place, feature) in features.iter().enumerate() {
            let what = format!("{name}.{place}");
            check_close(&what, &nchw(feature), &golden[&what], TOLERANCE);
        }
    }
}

fn layout(file: &str) -> Result<IpAdapterLayout, Error> {
    let tensors = candle_core::safetensors::load(networks().join(file), &Device::Cpu).unwrap();
    let shapes = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
    IpAdapterLayout::of(&shapes, file, "ip_adapter.0.model")
}

fn worker() -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![networks()];
    config.workers.instructors.postprocessing.roots = vec![steer()];
    Worker::with(&config)
}

fn request(fields: Value) -> GenerateRequest {
    let mut whole = json!({ "prompt": "a barn", "width": 64, "height": 64, "steps": 2, "seed": 1, "dtype": "f32" });
    whole.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    serde_json::from_value(whole).unwrap()
}

/// The code and message of a request's error.
fn refusal(fields: Value) -> (&'static str, String) {
    let mut worker = worker();
    let ctx = Context::detached();
    let inference = &worker.instructors.inference;
    let made = inference.plan(&request(fields), &mut worker.managers).and_then(|plan| {
        let placement = inference.device.place(&mut worker.managers.device, plan.dtype)?;
        latents(inference, &plan, &placement, &mut worker.managers, &ctx)
    });
    let error = made.unwrap_err();
    (error.code(), error.to_string())
}

fn written(name: &str, tensors: &[(&str, &[usize])]) -> String {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> =
        tensors.iter().map(|(name, shape)| ((*name).to_owned(), zeros(shape))).collect();
    candle_core::safetensors::save(&tensors, networks().join(name)).unwrap();
    name.to_owned()
}

fn ip(model: &str) -> Value {
    json!({ "ip_adapter": { "model": model, "image": outline(), "image_encoder": "ip/encoder" } })
}

fn outline() -> &'static str {
    "tests/steer/files/adapter_outline.png"
}

#[test]
fn adapter_files_of_other_kinds_are_refused_by_name() {
    let face = [("image_proj.norm.weight", &[96][..]), ("image_proj.proj.0.weight", &[8, 8])];
    let (code, message) = refusal(ip(&written("face.safetensors", &face)));
    assert_eq!(code, "unsupported_feature");
    assert!(message.contains("IP-Adapter FaceID"), "{message}");

    let plain = [
        ("image_proj.proj.weight", &[4 * 96, 40][..]),
        ("image_proj.proj.bias", &[4 * 96]),
        ("image_proj.norm.weight", &[96]),
        ("image_proj.norm.bias", &[96]),
        ("ip_adapter.1.to_k_ip.weight", &[320, 96]),
        ("ip_adapter.1.to_v_ip.weight", &[320, 96]),
    ];
    let (code, message) = refusal(ip(&written("other.safetensors", &plain)));
    assert_eq!(code, "model_unsupported");
    assert!(message.contains("for another UNet"), "{message}");

    let (code, message) = refusal(ip(&written("nothing.safetensors", &[("weight", &[1])])));
    assert_eq!(code, "model_unsupported");
    assert!(message.contains("it is no IP-Adapter"), "{message}");

    fs::write(networks().join("pickled.bin"), b"\x80\x04").unwrap();
    assert_eq!(refusal(ip("pickled.bin")).0, "unsafe_format");
    assert_eq!(refusal(ip("../plain.safetensors")).0, "path_not_allowed");
    assert_eq!(refusal(ip("absent.safetensors")).0, "model_not_found");

    let encoder = json!({ "ip_adapter": { "model": "ip/plain", "image": outline(), "image_encoder": "ip/plain" } });
    let (code, message) = refusal(encoder);
    assert_eq!(code, "model_unsupported");
    assert!(message.contains("config.json"), "{message}");
}

/// Weight files have two possible names; the error is about the one that exists.
#[test]
fn adapter_folder_is_identified_by_its_weights() {
    let folder = |name: &str, files: &[(&str, &str)]| {
        fs::create_dir_all(networks().join(name)).unwrap();
        for (file, text) in files {
            fs::write(networks().join(name).join(file), text).unwrap();
        }
        json!({ "t2i_adapter": { "model": name, "image": outline() } })
    };
    let config = ("config.json", "{}");
    let check = |fields: Value, wanted: &str, text: &str| {
        let (code, message) = refusal(fields);
        assert_eq!(code, wanted, "{message}");
        assert!(message.contains(text), "{message}");
    };
    let index = ("diffusion_pytorch_model.safetensors.index.json", r#"{ "weight_map": {} }"#);
    check(folder("no_shards", &[config, index]), "model_corrupt", "names no files");
    let index = ("model.safetensors.index.json", r#"{ "weight_map": {} }"#);
    check(folder("no_shards_either", &[config, index]), "model_corrupt", "names no files");
    check(folder("pickles", &[config, ("model.bin", "\x02")]), "unsafe_format", "");
    check(folder("bare", &[config]), "model_corrupt", "`diffusion_pytorch_model.safetensors` is missing");
}

/// No published network has these sizes, and they would take unbounded memory.
#[test]
fn impossible_adapter_sizes_are_refused() {
    let t2i = |more: Value| {
        let mut config: Value = config("t2i/outline");
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value::<T2iAdapterConfig>(config).unwrap().check("mine")
    };
    assert!(t2i(json!({ "channels": [320, 640, 1280, 1280] })).is_ok());
    for wrong in [json!({ "downscale_factor": 7 }), json!({ "downscale_factor": 65 }), json!({ "channels": [4097] })] {
        assert_eq!(t2i(wrong.clone()).unwrap_err().code(), "model_unsupported", "{wrong}");
    }
    let vision = |more: Value| {
        let mut config: Value = config("ip/encoder");
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value::<ClipVisionConfig>(config).unwrap().check("mine")
    };
    assert!(vision(json!({ "hidden_size": 1664, "intermediate_size": 8192, "num_attention_heads": 16 })).is_ok());
    assert!(vision(json!({ "image_size": 336, "patch_size": 14 })).is_ok());
    for wrong in [
        json!({ "image_size": 130, "patch_size": 2 }),
        json!({ "image_size": 8, "patch_size": 16 }),
        json!({ "patch_size": 0 }),
        json!({ "intermediate_size": 0 }),
        json!({ "intermediate_size": 8 * 48 + 1 }),
    ] {
        assert_eq!(vision(wrong.clone()).unwrap_err().code(), "model_unsupported", "{wrong}");
    }
    let plus = |name: &str, shape: &[usize]| {
        let tensors = candle_core::safetensors::load(networks().join("ip/plus.safetensors"), &Device::Cpu).unwrap();
        let mut shapes: BTreeMap<_, _> =
            tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
        shapes.insert(name.to_owned(), shape.to_vec());
        IpAdapterLayout::of(&shapes, "mine", "ip_adapter.0.model")
    };
    assert!(plus("image_proj.latents", &[1, 256, 64]).is_ok());
    let wide = 1 << 16;
    for (name, shape) in [
        ("image_proj.latents", &[1, 257, 64][..]),
        ("image_proj.latents", &[1, 0, 64]),
        ("image_proj.layers.0.0.to_q.weight", &[wide, 64]),
        ("image_proj.layers.0.1.1.weight", &[wide, 64]),
        ("image_proj.proj_out.weight", &[wide, 64]),
    ] {
        assert_eq!(plus(name, shape).unwrap_err().code(), "model_unsupported", "{name} {shape:?}");
    }
}

#[test]
fn out_of_range_adapter_options_name_their_field() {
    let check = |fields: Value, wanted: &str| {
        let (code, message) = refusal(fields);
        assert_eq!(code, "invalid_parameter", "{message}");
        assert!(message.contains(wanted), "{message}");
    };
    let t2i = |more: Value| {
        let mut one = json!({ "model": "t2i/outline", "image": outline() });
        one.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "t2i_adapter": one })
    };
    check(t2i(json!({ "weight": 11.0 })), "t2i_adapter.0.weight");
    check(t2i(json!({ "end": 1.5 })), "t2i_adapter.0.end");
    let mut odd = t2i(json!({}));
    odd["width"] = json!(72);
    check(odd, "must be a multiple of 16 for `t2i/outline`, got 72");
    let mut late = ip("ip/plain");
    late["ip_adapter"]["start"] = json!(0.6);
    late["ip_adapter"]["end"] = json!(0.5);
    check(late, "ip_adapter.0.start");
    let mut none = ip("ip/plain");
    none["ip_adapter"]["image"] = json!([]);
    check(none, "must be 1 to 16, got 0");
}

#[test]
fn adapter_report_and_echo_reproduce_the_image() {
    let mut worker = worker();
    let fields = json!({
        "t2i_adapter": { "model": "t2i/outline", "image": outline() },
        "ip_adapter": [{ "model": "ip/plus.safetensors", "image": outline(), "image_encoder": "ip/encoder" }],
    });
    let inference = &worker.instructors.inference;
    let plan = inference.plan(&request(fields), &mut worker.managers).unwrap();
    let echo = serde_json::to_value(GenerateRequest::from(&plan)).unwrap();
    assert_eq!(echo["t2i_adapter"], json!([{ "model": "t2i/outline", "image": outline(), "weight": 1.0, "end": 1.0 }]));
    let ip = json!([{ "model": "ip/plus.safetensors", "image": [outline()], "image_encoder": "ip/encoder", "weight": 1.0, "start": 0.0, "end": 1.0 }]);
    assert_eq!(echo["ip_adapter"], ip);
    let again: GenerateRequest = serde_json::from_value(echo).unwrap();
    let planned_again = inference.plan(&again, &mut worker.managers).unwrap();
    assert_eq!(GenerateRequest::from(&planned_again), GenerateRequest::from(&plan));

    let placement = inference.device.place(&mut worker.managers.device, Some(Dtype::F32)).unwrap();
    let ctx = Context::detached();
    let resources = &mut worker.managers.conditioning;
    let task = AdaptTask { plan: &plan.adapters, size: plan.first().size, guided: true, placement: &placement };
    let adapted = inference.conditioning.adapt(task, resources, &ctx).unwrap();
    let counts: Vec<_> = adapted.facts.iter().map(|one| (one.kind, one.applied, one.unused)).collect();
    let all = |file: &str| candle_core::safetensors::load(networks().join(file), &Device::Cpu).unwrap().len();
    let outline = all("t2i/outline/diffusion_pytorch_model.safetensors");
    assert_eq!(counts, [("t2i_adapter", outline, 0), ("ip_adapter", all("ip/plus.safetensors"), 0)]);
    // One cache each, with the bytes it holds.
    let resident: Vec<_> = worker.managers.resident().into_iter().filter(|one| one.bytes.0 > 0).collect();
    let kinds: Vec<_> = resident.iter().map(|one| one.kind).collect();
    assert_eq!(kinds, ["t2i_adapter", "ip_adapter", "image_encoder"]);
}

/// Composed prompts, no guidance, img2img, and a hires pass, whose features have another size.
#[test]
fn adapters_apply_to_every_mode() {
    let mut worker = worker();
    let t2i = json!({ "t2i_adapter": { "model": "t2i/outline", "image": outline() } });
    let kinds = [
        json!({}),
        json!({ "cfg_scale": 1.0 }),
        json!({ "prompt": "a barn AND a sky", "cfg_scale": 1.0 }),
        json!({ "init_image": outline(), "denoising_strength": 1.0 }),
        json!({ "enable_hr": true, "hr_scale": 1.5, "denoising_strength": 1.0 }),
    ];
    for kind in kinds {
        let plain = worker.draw(&request(kind.clone())).remove(0).0;
        for steered in [&t2i, &ip("ip/plain"), &ip("ip/plus.safetensors")] {
            let mut fields = kind.clone();
            fields.as_object_mut().unwrap().extend(steered.as_object().unwrap().clone());
            let ours = worker.draw(&request(fields)).remove(0).0;
            let far = distance(&ours, &plain);
            println!("{kind} {}: {far:.2}", steered.as_object().unwrap().keys().next().unwrap());
            assert!(far > 0.02, "{kind} with {steered} is what it is without");
        }
    }
}
