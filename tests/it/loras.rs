//! LoRA and related formats against the reference, `tests/adapters/loras.json`: latents must agree to 1e-4 of their
//! standard deviation. A file gives the same bytes under every naming, and removing it restores the image.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

mod namings;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use candle_core::{DType, Device, Tensor};
use sdxl_worker::context::Context;
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::error::Result;
use sdxl_worker::inference::interface::{GenerateRequest, Generated, Request, Response};
use sdxl_worker::inference::request::lora::{AppliedAdapter, LoraList, LoraOptions};
use sdxl_worker::inference::request::lora_blocks::BlockWeights;
use sdxl_worker::model::lora::LoraFacts;
use sdxl_worker::runtime::config::Config;
use sdxl_worker::runtime::dispatch::{Call, Reply};
use serde_json::json;

use self::namings::{NAMINGS, renamed};
use super::drawing::{Worker, distance, latents};

/// Largest difference of the latents, in units of the reference's standard deviation.
const TOLERANCE: f64 = 1e-4;

#[derive(serde::Deserialize)]
struct Mode {
    /// The script and the versions that made the goldens.
    #[serde(rename = "made_by")]
    _made_by: String,
    cases: BTreeMap<String, GenerateRequest>,
}

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapters")
}

pub(crate) fn worker(more: &Path) -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![folder().join("files"), more.to_owned()];
    Worker::with(&config)
}

pub(crate) fn small(loras: &[(&str, f64)]) -> GenerateRequest {
    let options = |(name, weight): &(&str, f64)| LoraOptions {
        model: Some((*name).to_owned()),
        weight: Some(*weight),
        ..LoraOptions::default()
    };
    GenerateRequest {
        prompt: Some("a lighthouse".to_owned()),
        steps: Some(2),
        width: Some(64),
        height: Some(64),
        seed: Some(1),
        dtype: Some(Dtype::F32),
        loras: Some(LoraList(loras.iter().map(options).collect())),
        ..GenerateRequest::default()
    }
}

/// The pixels as bytes.
pub(crate) fn pixels(worker: &mut Worker, request: &GenerateRequest) -> Vec<u8> {
    worker.draw(request).remove(0).1.data
}

pub(crate) type File = HashMap<String, Tensor>;

pub(crate) fn load(name: &str) -> File {
    candle_core::safetensors::load(folder().join("files").join(format!("{name}.safetensors")), &Device::Cpu).unwrap()
}

#[test]
fn lora_images_equal_diffusers() {
    let mode: Mode = serde_json::from_str(&fs::read_to_string(folder().join("loras.json")).unwrap()).unwrap();
    let goldens = candle_core::safetensors::load(folder().join("loras.safetensors"), &Device::Cpu).unwrap();
    let mut worker = worker(&folder());
    let mut failures = Vec::new();
    for (name, request) in mode.cases {
        let request = GenerateRequest { dtype: Some(Dtype::F32), ..request };
        let plain = GenerateRequest { loras: None, ..request.clone() };
        let ours = worker.draw(&request).remove(0).0;
        let (distance, change) =
            (distance(&ours, &goldens[&name]), distance(&worker.draw(&plain).remove(0).0, &goldens[&name]));
        println!("{name:<16} {distance:>9.2e} (without it {change:.2})");
        if distance.is_nan() || distance > TOLERANCE || change < 200.0 * TOLERANCE {
            failures.push(format!("{name}: {distance:.2e}, without it {change:.2}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_naming_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let file = load("kohya");
    for naming in NAMINGS {
        let path = folder.path().join(format!("in_{naming}.safetensors"));
        candle_core::safetensors::save(&renamed(&file, naming), path).unwrap();
    }
    let mut worker = worker(folder.path());
    let wanted = pixels(&mut worker, &small(&[("kohya", 0.8)]));
    for naming in NAMINGS {
        let same = pixels(&mut worker, &small(&[(&format!("in_{naming}"), 0.8)])) == wanted;
        assert!(same, "{naming}");
    }
}

/// Every format by component and naming: the distance from diffusers with the layers changed by the formula; the other
/// namings must give the same bytes.
#[test]
fn every_format_applies_to_every_component_under_every_name() {
    let mode: Mode = serde_json::from_str(&fs::read_to_string(folder().join("formats.json")).unwrap()).unwrap();
    let goldens = candle_core::safetensors::load(folder().join("formats.safetensors"), &Device::Cpu).unwrap();
    let more = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    let mut worker = worker(more.path());
    println!("{:<14} {:<15} {:>9} {:>8}  {}", "format", "component", "distance", "change", NAMINGS.join(" "));
    for (name, request) in mode.cases {
        let request = GenerateRequest { dtype: Some(Dtype::F32), ..request };
        let plain = GenerateRequest { loras: None, ..request.clone() };
        let (ours, pixels) = worker.draw(&request).remove(0);
        let golden = &goldens[&name];
        let (distance, change) = (distance(&ours, golden), distance(&worker.draw(&plain).remove(0).0, golden));
        let (format, component) = name.split_once(' ').unwrap();
        let mut same = Vec::new();
        for naming in NAMINGS {
            let other = format!("{}_{naming}", format.replace('-', "_"));
            let path = more.path().join(format!("{other}.safetensors"));
            if !path.exists() {
                let file = renamed(&load(&format!("as_{format}")), naming);
                candle_core::safetensors::save(&file, &path).unwrap();
            }
            let mut again = request.clone();
            again.loras.as_mut().unwrap().0[0].model = Some(other);
            let is_same = worker.draw(&again).remove(0).1.data == pixels.data;
            same.push(format!("{:>width$}", if is_same { "=" } else { "≠" }, width = naming.len()));
            if !is_same {
                failures.push(format!("{name}: other bytes as {naming}"));
            }
        }
        println!("{format:<14} {component:<15} {distance:>9.2e} {change:>8.3}  {}", same.join(" "));
        if distance.is_nan() || distance > TOLERANCE || change < 100.0 * TOLERANCE {
            failures.push(format!("{name}: {distance:.2e}, without it {change:.2}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn removing_a_lora_restores_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    let plain = GenerateRequest { loras: None, ..small(&[]) };
    let before = pixels(&mut worker, &plain);
    let one = pixels(&mut worker, &small(&[("kohya", 1.0)]));
    assert!(one != before);
    let other = pixels(&mut worker, &small(&[("kohya", 0.5), ("conv", 0.5)]));
    assert!(other != one);
    assert!(pixels(&mut worker, &plain) == before);
    assert!(pixels(&mut worker, &small(&[("kohya", 0.0)])) == before, "of no weight");
    assert!(pixels(&mut worker, &small(&[("kohya", 1.0)])) == one);
    // Layers shared with other adapted networks must equal freshly loaded ones.
    let mut fresh = self::worker(folder.path());
    assert!(pixels(&mut fresh, &small(&[("kohya", 0.5), ("conv", 0.5)])) == other);
    assert!(pixels(&mut fresh, &plain) == before);
}

#[test]
fn int8_weights_are_merged_before_rounding() {
    use sdxl_worker::device::interface::Quantization;
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    let coarse = |request: GenerateRequest| GenerateRequest { quantization: Some(Quantization::Int8), ..request };
    let plain = coarse(GenerateRequest { loras: None, ..small(&[]) });
    let before = pixels(&mut worker, &plain);
    let (changed, image) = worker.draw(&coarse(small(&[("kohya", 1.0)]))).remove(0);
    assert!(image.data != before, "the change is seen");
    let exact = worker.draw(&small(&[("kohya", 1.0)])).remove(0).0;
    let distance = distance(&changed, &exact);
    println!("int8 with a LoRA against f32 with it: {distance:.2e}");
    assert!(distance < 0.3, "{distance}");
    assert!(pixels(&mut worker, &plain) == before);
}

#[test]
fn untouched_layers_are_shared() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    let held = |worker: &Worker| {
        let of = |kind: &str| {
            let all = worker.managers.resident();
            all.iter().filter(|one| one.kind == kind).map(|one| one.bytes.0).collect::<Vec<_>>()
        };
        (of("unet"), of("encoder"))
    };
    pixels(&mut worker, &GenerateRequest { loras: None, ..small(&[]) });
    let (unet, encoder) = held(&worker);
    pixels(&mut worker, &small(&[("first", 1.0)]));
    let (unets, encoders) = held(&worker);
    assert_eq!(unets, unet, "of a change of the first text encoder the UNet knows nothing");
    let sum = |all: &[u64]| all.iter().sum::<u64>();
    assert!(encoders.len() == 2 && sum(&encoders) < encoder[0] * 3 / 2, "{encoders:?}");
    pixels(&mut worker, &small(&[("unet", 1.0)]));
    let (unets, encoders) = held(&worker);
    // Merged layers are f32; they were f16.
    assert!(unets.len() == 2 && sum(&unets) < 2 * unet[0], "{unets:?}");
    assert_eq!(encoders.len(), 2, "the prompt was encoded before");
}

#[test]
fn lora_that_changes_nothing_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, tensors: &[(&str, &[usize])]| {
        let one = |(key, shape): &(&str, &[usize])| {
            ((*key).to_owned(), Tensor::ones(*shape, DType::F32, &Device::Cpu).unwrap())
        };
        let file: File = tensors.iter().map(one).collect();
        candle_core::safetensors::save(&file, folder.path().join(format!("{name}.safetensors"))).unwrap();
    };
    let attention = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k";
    let (up, down) = (format!("{attention}.lora_up.weight"), format!("{attention}.lora_down.weight"));
    write("sd15", &[(&up, &[160, 2]), (&down, &[2, 768])]);
    write("flux", &[("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", &[2, 3072])]);
    write("none", &[("something.else", &[2, 2])]);
    write("half", &[(&up, &[160, 2])]);
    write("narrow", &[(&up, &[80, 2]), (&down, &[2, 96])]);
    let mut worker = worker(folder.path());
    let mut refusal = |name: &str| {
        let inference = &worker.instructors.inference;
        let plan = inference.plan(&small(&[(name, 1.0)]), &mut worker.managers).map(drop);
        plan.and_then(|()| {
            let plan = inference.plan(&small(&[(name, 1.0)]), &mut worker.managers)?;
            let placement = inference.device.place(&mut worker.managers.device, plan.dtype)?;
            latents(inference, &plan, &placement, &mut worker.managers, &Context::detached()).map(drop)
        })
        .unwrap_err()
    };
    for (name, words) in [
        ("sd15", &["Stable Diffusion 1.5", "768"][..]),
        ("flux", &["Flux"]),
        ("none", &["something.else", "no layer"]),
        ("half", &["lora_down.weight", "missing"]),
        ("narrow", &["lora_up.weight", "[80, 2]", "160×96"]),
    ] {
        let error = refusal(name);
        println!("{error}");
        assert_eq!(error.code(), "model_unsupported", "{name}: {error}");
        let text = error.to_string();
        assert!(words.iter().chain([&name]).all(|word| text.contains(word)), "{name}: {text}");
    }
    let error = refusal("kohy");
    assert_eq!((error.code(), error.hint()), ("model_not_found", Some("did you mean `kohya`?".to_owned())));
}

#[test]
fn component_and_block_weights_equal_partial_files() {
    let folder = tempfile::tempdir().unwrap();
    let part = |name: &str, wanted: &dyn Fn(&str) -> bool| {
        let file: File = load("kohya").into_iter().filter(|(key, _)| wanted(key)).collect();
        candle_core::safetensors::save(&file, folder.path().join(format!("{name}.safetensors"))).unwrap();
    };
    part("only_unet", &|key| key.starts_with("lora_unet"));
    part("only_first", &|key| key.starts_with("lora_te1"));
    part("only_second", &|key| key.starts_with("lora_te2"));
    part("only_mid", &|key| key.starts_with("lora_unet_mid_block"));
    let mut worker = worker(folder.path());
    let whole = LoraOptions { model: Some("kohya".to_owned()), ..LoraOptions::default() };
    let mut check = |options: LoraOptions, same: &[(&str, f64)]| {
        let request = GenerateRequest { loras: Some(LoraList(vec![options.clone()])), ..small(&[]) };
        assert!(pixels(&mut worker, &request) == pixels(&mut worker, &small(same)), "{options:?}");
    };
    check(LoraOptions { weight: Some(0.0), unet_weight: Some(0.6), ..whole.clone() }, &[("only_unet", 0.6)]);
    check(LoraOptions { unet_weight: Some(0.0), ..whole.clone() }, &[("only_first", 1.0), ("only_second", 1.0)]);
    let second = LoraOptions { weight: Some(0.0), text_encoder_2_weight: Some(2.0), ..whole.clone() };
    check(second, &[("only_second", 2.0)]);
    let blocks = [("down_blocks", 0.0), ("up_blocks", 0.0), ("mid_block", 0.5)];
    let blocks = blocks.into_iter().map(|(name, weight)| (name.to_owned(), weight)).collect();
    check(
        LoraOptions { text_encoder_weight: Some(0.0), blocks: Some(BlockWeights::Named(blocks)), ..whole.clone() },
        &[("only_mid", 0.5)],
    );
    // In the prompt, the first weight is for the text encoders and the second for the UNet.
    let tagged =
        GenerateRequest { prompt: Some("a lighthouse<lora:kohya:0:0.6>".to_owned()), loras: None, ..small(&[]) };
    assert!(pixels(&mut worker, &tagged) == pixels(&mut worker, &small(&[("only_unet", 0.6)])));
}

pub(crate) fn generate(worker: &mut Worker, data: serde_json::Value) -> Result<Generated> {
    let mut whole = json!({ "seed": 3, "steps": 1, "width": 64, "height": 64, "output": { "return": "base64" } });
    whole.as_object_mut().unwrap().extend(data.as_object().unwrap().clone());
    let request = Request::Lora(Box::new(serde_json::from_value(whole).unwrap()));
    match worker.instructors.dispatch(Call::Inference(request), &mut worker.managers, &Context::detached())? {
        Reply::Inference(Response::Generated(generated)) => Ok(generated),
        other => panic!("{other:?}"),
    }
}

/// A file with PEFT names and no alphas; its configuration says that they are half the rank.
#[test]
fn alphas_of_peft_and_diffusers_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let alpha = json!({ "unet.lora_alpha": 1, "unet.r": 2, "text_encoder.lora_alpha": 4.0, "text_encoder.use_rslora": true,
        "text_encoder_2.lora_alpha": 2, "text_encoder_2.alpha_pattern": { "self_attn.q_proj": 1 } });
    let (mut whole, mut halved) = (load("peft"), File::new());
    let kept = |key: &str| key.contains("unet.") || key.contains("text_encoder_2.");
    whole.retain(|key, _| kept(key));
    // Half of a small f16 is not a half.
    whole.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F32).unwrap());
    for (key, tensor) in &whole {
        let half = key.starts_with("unet.") || key.contains("q_proj");
        let factor = if half && key.ends_with("lora_B.weight") { 0.5 } else { 1.0 };
        halved.insert(key.clone(), (tensor * factor).unwrap());
    }
    candle_core::safetensors::save(&halved, folder.path().join("halved.safetensors")).unwrap();
    let path = folder.path().join("said.safetensors");
    candle_core::safetensors::save(&whole, &path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header["__metadata__"] = json!({ "lora_adapter_metadata": alpha.to_string() });
    let header = header.to_string().into_bytes();
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat()).unwrap();
    let mut worker = worker(folder.path());
    let wanted = pixels(&mut worker, &small(&[("halved", 1.0)]));
    assert!(pixels(&mut worker, &small(&[("said", 1.0)])) == wanted, "in the metadata");

    let own = folder.path().join("own");
    fs::create_dir(&own).unwrap();
    whole.retain(|key, _| key.starts_with("unet."));
    candle_core::safetensors::save(&whole, own.join("adapter_model.safetensors")).unwrap();
    fs::write(own.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 1}"#).unwrap();
    halved.retain(|key, _| key.starts_with("unet."));
    candle_core::safetensors::save(&halved, folder.path().join("of_unet.safetensors")).unwrap();
    let wanted = pixels(&mut worker, &small(&[("of_unet", 1.0)]));
    assert!(pixels(&mut worker, &small(&[("own", 1.0)])) == wanted, "in a folder");
}

#[test]
fn lora_report_and_echo_reproduce_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = load("kohya");
    file.insert("lora_unet_nowhere.lora_up.weight".to_owned(), Tensor::ones(1, DType::F32, &Device::Cpu).unwrap());
    fs::create_dir(folder.path().join("loras")).unwrap();
    candle_core::safetensors::save(&file, folder.path().join("loras/more.safetensors")).unwrap();
    let mut worker = worker(folder.path());
    let made = generate(&mut worker, json!({ "prompt": "a lake <lora:more:0.5:0.25>", "loras": "unet" })).unwrap();
    let facts: Vec<&LoraFacts> = made
        .adapters
        .iter()
        .filter_map(|one| match one {
            AppliedAdapter::Lora(facts) => Some(facts),
            AppliedAdapter::Picture(_) => None,
        })
        .collect();
    let [unet, more] = facts[..] else { panic!("{facts:?}") };
    assert_eq!((unet.model.as_str(), &unet.formats[..], &unet.components[..]), ("unet", &["lora"][..], &["unet"][..]));
    assert_eq!((unet.applied, unet.skipped), (load("unet").len(), 0));
    assert_eq!(more.components, ["text_encoder", "text_encoder_2", "unet"]);
    assert_eq!((more.applied, more.skipped), (file.len() - 1, 1));
    assert_eq!(more.skipped_keys, ["lora_unet_nowhere.lora_up.weight"]);
    assert!(unet.ms > 0.0 && more.ms > 0.0);
    assert_eq!(made.parameters.prompt.as_deref(), Some("a lake "));
    let LoraList(decided) = made.parameters.loras.clone().unwrap();
    assert_eq!(decided[1].unet_weight, Some(0.25));
    let png =
        |made: &Generated| base64::engine::general_purpose::STANDARD.decode(made.images[0].base64.as_ref().unwrap());
    let text = String::from_utf8_lossy(&png(&made).unwrap()).into_owned();
    assert!(text.contains("a lake <lora:unet:1> <lora:more:0.5:0.25>"), "the image's text names them");
    let again = serde_json::to_value(&*made.parameters).unwrap();
    let same = generate(&mut worker, again).unwrap();
    assert_eq!(same.images[0].base64, made.images[0].base64);
}

#[test]
fn unusable_lora_options_name_their_field() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    for (data, pointer, words) in [
        (json!({ "prompt": "a" }), "/data/loras", "is missing"),
        (json!({ "prompt": "a", "loras": [{}] }), "/data/loras/0/model", "is missing"),
        (json!({ "prompt": "a", "loras": [{ "model": "unet", "weight": 11 }] }), "/data/loras/0/weight", "-10 to 10"),
        (
            json!({ "prompt": "a", "lora": { "name": "unet", "blocks": { "mid_blok": 1 } } }),
            "/data/loras/0/blocks",
            "mid_blok",
        ),
        (
            json!({ "prompt": "a", "lora": { "name": "unet", "blocks": { "mid_block": 20 } } }),
            "/data/loras/0/blocks/mid_block",
            "-10 to 10",
        ),
        (json!({ "prompt": "a", "lora": { "name": "unet", "lbw": [1, 2] } }), "/data/loras/0/blocks", "12 or 20"),
        (json!({ "prompt": "a <lora:unet:much>" }), "/data/prompt", "much"),
        (json!({ "prompt": "a", "loras": vec!["unet"; 33] }), "/data/loras", "at most 32"),
    ] {
        let error = generate(&mut worker, data.clone()).unwrap_err();
        assert_eq!((error.code(), error.pointer().as_deref()), ("invalid_parameter", Some(pointer)), "{data}: {error}");
        assert!(error.to_string().contains(words), "{data}: {error}");
    }
    let close =
        generate(&mut worker, json!({ "prompt": "a", "lora": { "name": "unet", "blocks": { "mid_blok": 1 } } }))
            .unwrap_err();
    assert_eq!(close.hint().as_deref(), Some("did you mean `mid_block`?"));
}
