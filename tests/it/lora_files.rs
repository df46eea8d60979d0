//! LoRA files as trainers write them: names, metadata and neighbouring files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sdxl_worker::error::Error;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::runtime::config::Config;
use serde_json::{Value, json};

use crate::conditioning::demo_folder;
use crate::drawing::{Worker, distance};
use crate::loras::{File, generate, load, pixels, small, worker};

fn save(file: &File, path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    candle_core::safetensors::save(file, path).unwrap();
}

/// The same file with metadata.
fn say(path: &Path, metadata: &Value) {
    let bytes = fs::read(path).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header["__metadata__"] = metadata.clone();
    let header = header.to_string().into_bytes();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat()).unwrap();
}

#[test]
fn lora_file_name_is_not_a_repository() {
    let folder = tempfile::tempdir().unwrap();
    let cache = tempfile::tempdir().unwrap();
    save(&load("kohya"), &folder.path().join("styles/ink.safetensors"));
    let plan = |download: bool, request: &GenerateRequest| {
        let mut config = Config::default();
        let model = &mut config.workers.instructors.model;
        // One root is inside the other.
        model.roots = vec![folder.path().to_owned(), folder.path().join("styles")];
        model.hub.download = download;
        model.hub.cache = Some(cache.path().to_owned());
        let mut worker = Worker::with(&config);
        worker.instructors.inference.plan(request, &mut worker.managers).map(drop)
    };
    for download in [false, true] {
        let tagged = |name: &str| GenerateRequest {
            prompt: Some(format!("a hill <lora:{name}:0.5>")),
            loras: None,
            ..small(&[])
        };
        plan(download, &tagged("ink")).unwrap();
        let error = plan(download, &tagged("inc")).unwrap_err();
        assert!(matches!(error, Error::ModelNotFound { .. }), "{error}");
        assert_eq!(error.hint(), Some("did you mean `ink`?".to_owned()));
        let error = plan(download, &tagged("owner/ghost")).unwrap_err();
        assert!(matches!(error, Error::Offline { .. } | Error::Unfetched { .. }), "{error}");
        let options = json!({ "prompt": "a ghost", "embeddings": [{ "name": "ghost" }] });
        let error = plan(download, &serde_json::from_value(options).unwrap()).unwrap_err();
        assert!(matches!(error, Error::ModelNotFound { .. }), "{error}");
    }
}

#[test]
fn lora_weights_may_be_integers() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    let wanted = pixels(&mut worker, &small(&[("kohya", 1.0)]));
    for dtype in [DType::I64, DType::U8] {
        let mut file = load("kohya");
        for (key, tensor) in &mut file {
            if key.ends_with(".alpha") {
                *tensor = tensor.to_dtype(dtype).unwrap();
            }
        }
        let name = format!("as_{}", dtype.as_str());
        save(&file, &folder.path().join(format!("{name}.safetensors")));
        assert!(pixels(&mut worker, &small(&[(&name, 1.0)])) == wanted, "{name}");
    }
}

#[test]
fn peft_alphas_are_read_wherever_they_are_stored() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let mut worker = worker(folder.path());
    let with_alpha = |alpha: f32| {
        let mut file = load("as_loha");
        file.retain(|key, _| key.starts_with("lora_unet"));
        for (key, tensor) in &mut file {
            if key.ends_with(".alpha") {
                *tensor = Tensor::new(alpha, &Device::Cpu).unwrap();
            }
        }
        file
    };
    let mut bare = with_alpha(1.0);
    bare.retain(|key, _| !key.ends_with(".alpha"));
    for (name, alpha, config) in [
        ("of_three", 3.0, json!({ "peft_type": "LOHA", "r": 2, "alpha": 3 })),
        ("of_eight", 8.0, json!({ "peft_type": "LOHA", "r": 2 })),
    ] {
        save(&with_alpha(alpha), &place(&format!("{name}_said.safetensors")));
        let wanted = pixels(&mut worker, &small(&[(&format!("{name}_said"), 0.2)]));
        save(&bare, &place(name).join("adapter_model.safetensors"));
        fs::write(place(name).join("adapter_config.json"), config.to_string()).unwrap();
        // The file belongs to a model in the same folder.
        fs::write(place(name).join("config.json"), r#"{"lora_alpha": 100}"#).unwrap();
        for model in [name.to_owned(), format!("{name}/adapter_model.safetensors")] {
            assert!(pixels(&mut worker, &small(&[(&model, 0.2)])) == wanted, "{model}");
        }
    }
    // diffusers writes an alpha per layer, more text than other metadata may have.
    let mut file = load("peft");
    file.retain(|key, _| key.starts_with("unet."));
    let halved = file.iter().map(|(key, tensor)| {
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        (key.clone(), if key.contains("lora_B") { (tensor * 0.5).unwrap() } else { tensor })
    });
    save(&halved.collect(), &place("halved.safetensors"));
    for tensor in file.values_mut() {
        *tensor = tensor.to_dtype(DType::F32).unwrap();
    }
    save(&file, &place("long.safetensors"));
    let names = (0..4000).map(|number| (format!("layers.{number}.of.nobody"), json!(7)));
    let metadata = json!({ "unet.lora_alpha": 1, "unet.r": 2, "unet.alpha_pattern": Value::Object(names.collect()) });
    assert!(metadata.to_string().len() > 100_000);
    say(&place("long.safetensors"), &json!({ "lora_adapter_metadata": metadata.to_string() }));
    let wanted = pixels(&mut worker, &small(&[("halved", 1.0)]));
    assert!(pixels(&mut worker, &small(&[("long", 1.0)])) == wanted, "of the long text");
}

#[test]
fn unusable_prompt_tag_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    let error = generate(&mut worker, json!({ "prompt": "a <lora:unet:11>" })).unwrap_err();
    assert_eq!((error.code(), error.pointer().as_deref()), ("invalid_parameter", Some("/data/prompt")), "{error}");
    assert!(error.to_string().contains("`<lora:unet:11>`"), "{error}");
}

/// Magnitudes per output of OpenCLIP's fused projection split in three; magnitudes per input cannot be split.
#[test]
fn fused_dora_magnitudes_follow_their_projection() {
    let folder = tempfile::tempdir().unwrap();
    let key = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight";
    let down = load("kohya").remove(key).unwrap().to_dtype(DType::F32).unwrap();
    let width = down.dim(1).unwrap();
    let ramp = |rows: usize, low: f64| {
        let rows = Tensor::arange(0_u32, u32::try_from(rows).unwrap(), &Device::Cpu).unwrap();
        ((rows.to_dtype(DType::F32).unwrap() * 1e-3).unwrap() + low).unwrap()
    };
    let up = ramp(3 * width * 2, -0.1).reshape((3 * width, 2)).unwrap();
    let scale = ramp(3 * width, 0.5).reshape((3 * width, 1)).unwrap();
    let (mut fused, mut divided) = (File::new(), File::new());
    let parts = [("lora_down.weight", &down), ("lora_up.weight", &up), ("dora_scale", &scale)];
    for (part, tensor) in parts {
        fused.insert(format!("lora_te2_transformer_resblocks_0_attn_in_proj.{part}"), tensor.clone());
        for (third, name) in ["q", "k", "v"].into_iter().enumerate() {
            let own = match part {
                "lora_down.weight" => tensor.clone(),
                _ => tensor.narrow(0, third * width, width).unwrap().contiguous().unwrap(),
            };
            divided.insert(format!("lora_te2_text_model_encoder_layers_0_self_attn_{name}_proj.{part}"), own);
        }
    }
    save(&fused, &folder.path().join("fused.safetensors"));
    save(&divided, &folder.path().join("divided.safetensors"));
    let mut worker = worker(folder.path());
    let wanted = pixels(&mut worker, &small(&[("divided", 1.0)]));
    assert!(wanted != pixels(&mut worker, &GenerateRequest { loras: None, ..small(&[]) }));
    assert!(pixels(&mut worker, &small(&[("fused", 1.0)])) == wanted);

    let of_inputs = ramp(width, 0.5).reshape((1, width)).unwrap();
    fused.insert("lora_te2_transformer_resblocks_0_attn_in_proj.dora_scale".to_owned(), of_inputs);
    fused.extend(load("unet"));
    save(&fused, &folder.path().join("whole.safetensors"));
    let wanted = pixels(&mut worker, &small(&[("unet", 1.0)]));
    assert!(pixels(&mut worker, &small(&[("whole", 1.0)])) == wanted, "nothing of the layer is applied");
}

/// A LoRA on f16 weights gives the same result as on the same values in f32.
#[test]
fn f16_weights_are_merged_in_f32() {
    let folder = tempfile::tempdir().unwrap();
    for (name, dtype) in [("half", DType::F16), ("wide", DType::F32)] {
        let place = folder.path().join(name);
        fs::create_dir(&place).unwrap();
        demo_folder(&place);
        for part in ["unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"] {
            let path = place.join(format!("{part}.safetensors"));
            let file = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
            let same = |tensor: &Tensor| tensor.to_dtype(DType::F16).unwrap().to_dtype(dtype).unwrap();
            let file: File = file.iter().map(|(key, tensor)| (key.clone(), same(tensor))).collect();
            fs::remove_file(&path).unwrap();
            candle_core::safetensors::save(&file, &path).unwrap();
        }
    }
    let mut worker = worker(folder.path());
    let mut latents = |model: &str, loras: &[(&str, f64)]| {
        let request = GenerateRequest { model: Some(model.to_owned()), ..small(loras) };
        worker.draw(&request).remove(0).0
    };
    let (half, wide) = (latents("half", &[("kohya", 0.8)]), latents("wide", &[("kohya", 0.8)]));
    let apart = distance(&half, &wide);
    assert!(apart < 1e-3, "{apart:.2e}");
    assert!(distance(&half, &latents("half", &[])) > 0.02, "the change is seen");
}
