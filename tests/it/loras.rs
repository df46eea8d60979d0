//! LoRA and its relatives against the reference, `tests/adapters/loras.json`: latents must agree to 1e-3 of their standard
//! deviation. The same file by every naming gives the same bytes, and without it the image is as it was.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sdxl_worker::config::Config;
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::inference::lora::{LoraWish, LoraWishes};

use super::drawing::{Worker, distance};

/// Largest difference of the latents, in units of the reference's standard deviation.
const TOLERANCE: f64 = 1e-3;

#[derive(serde::Deserialize)]
struct Mode {
    /// The script and the versions that made the goldens.
    #[serde(rename = "made_by")]
    _made_by: String,
    cases: BTreeMap<String, GenerateRequest>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapters")
}

fn worker(more: &Path) -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![folder().join("files"), more.to_owned()];
    Worker::with(&config)
}

fn small(loras: &[(&str, f64)]) -> GenerateRequest {
    let wish = |(name, weight): &(&str, f64)| LoraWish {
        model: Some((*name).to_owned()),
        weight: Some(*weight),
        ..LoraWish::default()
    };
    GenerateRequest {
        prompt: Some("a lighthouse".to_owned()),
        steps: Some(2),
        width: Some(64),
        height: Some(64),
        seed: Some(1),
        dtype: Some(Dtype::F32),
        loras: Some(LoraWishes(loras.iter().map(wish).collect())),
        ..GenerateRequest::default()
    }
}

/// Bytes of the pixels.
fn pixels(worker: &mut Worker, request: &GenerateRequest) -> Vec<u8> {
    worker.draw(request).remove(0).1.data
}

type File = HashMap<String, Tensor>;

fn load(name: &str) -> File {
    candle_core::safetensors::load(folder().join("files").join(format!("{name}.safetensors")), &Device::Cpu).unwrap()
}

#[test]
fn images_are_the_references() {
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
        if distance.is_nan() || distance > TOLERANCE || change < 0.1 {
            failures.push(format!("{name}: {distance:.2e}, without it {change:.2}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// diffusers' name of the module of a kohya key, by the demonstration model's own layers.
fn modules() -> HashMap<String, (&'static str, String)> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let mut known = HashMap::new();
    for (part, file, kohya) in [
        ("unet", "unet/diffusion_pytorch_model", "lora_unet"),
        ("text_encoder", "text_encoder/model", "lora_te1"),
        ("text_encoder_2", "text_encoder_2/model", "lora_te2"),
    ] {
        let weights = candle_core::safetensors::load(demo.join(format!("{file}.safetensors")), &Device::Cpu).unwrap();
        for name in weights.keys().filter_map(|name| name.strip_suffix(".weight")) {
            known.insert(format!("{kohya}_{}", name.replace('.', "_")), (part, name.to_owned()));
        }
    }
    known
}

/// What the single file calls a layer of the demonstration model's UNet, which has one residual block at each resolution.
fn single_file(name: &str) -> String {
    let number = |text: &str| text.parse::<usize>().unwrap();
    let parts: Vec<&str> = name.splitn(5, '.').collect();
    match parts[..] {
        ["down_blocks", block, "attentions", _, rest] => format!("input_blocks.{}.1.{rest}", 2 * number(block) + 1),
        ["up_blocks", block, "attentions", place, rest] => {
            format!("output_blocks.{}.1.{rest}", 2 * number(block) + number(place))
        }
        ["mid_block", "attentions", "0", ..] => format!("middle_block.1.{}", name.splitn(4, '.').last().unwrap()),
        _ => panic!("{name}"),
    }
}

/// The kohya file `kohya` by another naming.
fn renamed(file: &File, naming: &str) -> File {
    let known = modules();
    let mut all = File::new();
    for (key, tensor) in file {
        let (module, part) = key.split_once('.').unwrap();
        let (network, name) = &known[module];
        let (side, up) = match part {
            "lora_up.weight" => ("B", "up"),
            "lora_down.weight" => ("A", "down"),
            _ => ("", "alpha"),
        };
        let alpha = side.is_empty();
        let is_unet = *network == "unet";
        let new = match naming {
            "peft" if !alpha => format!("{network}.{name}.lora_{side}.weight"),
            "peft-default" if !alpha => format!("base_model.model.{network}.{name}.lora_{side}.default.weight"),
            "peft" | "peft-default" => format!("{network}.{name}.alpha"),
            "processor" if alpha => format!("{network}.{name}.alpha"),
            "processor" if is_unet && name.contains(".attn") => {
                let (attention, projection) = name.split_once(".to_").unwrap();
                let projection = projection.strip_suffix(".0").unwrap_or(projection);
                format!("{network}.{attention}.processor.to_{projection}_lora.{up}.weight")
            }
            "processor" if is_unet => format!("{network}.{name}.lora.{up}.weight"),
            "processor" => format!("{network}.{name}.lora_linear_layer.{up}.weight"),
            "single-file" if is_unet => format!("lora_unet_{}.{part}", single_file(name).replace('.', "_")),
            "single-file-dotted" if is_unet => format!("diffusion_model.{}.{part}", single_file(name)),
            "model-dotted" if is_unet => format!("model.diffusion_model.{}.{part}", single_file(name)),
            "single-file" | "single-file-dotted" | "model-dotted" => key.clone(),
            "openclip" if *network == "text_encoder_2" => {
                let rest = name.strip_prefix("text_model.encoder.layers.").unwrap();
                let (place, rest) = rest.split_once('.').unwrap();
                let rest = match rest {
                    "self_attn.out_proj" => "attn_out_proj",
                    "mlp.fc1" => "mlp_c_fc",
                    "mlp.fc2" => "mlp_c_proj",
                    _ => {
                        all.insert(key.clone(), tensor.clone());
                        continue;
                    }
                };
                format!("lora_te2_transformer_resblocks_{place}_{rest}.{part}")
            }
            "openclip" => key.clone(),
            "bare" if is_unet => format!("{name}.{part}"),
            "bare" => key.clone(),
            _ => panic!("{naming}"),
        };
        all.insert(new, tensor.clone());
    }
    all
}

#[test]
fn every_naming_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let file = load("kohya");
    let namings =
        ["peft", "peft-default", "processor", "single-file", "single-file-dotted", "model-dotted", "openclip", "bare"];
    for naming in namings {
        candle_core::safetensors::save(&renamed(&file, naming), folder.path().join(format!("as-{naming}.safetensors")))
            .unwrap();
    }
    let mut worker = worker(folder.path());
    let wanted = pixels(&mut worker, &small(&[("kohya", 0.8)]));
    for naming in namings {
        let same = pixels(&mut worker, &small(&[(&format!("as-{naming}"), 0.8)])) == wanted;
        println!("{naming:<20} {}", if same { "the same bytes" } else { "differs" });
        assert!(same, "{naming}");
    }
}

#[test]
fn without_it_the_image_is_as_it_was() {
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
    // What is shared with networks that were changed otherwise must be what is read anew.
    let mut fresh = self::worker(folder.path());
    assert!(pixels(&mut fresh, &small(&[("kohya", 0.5), ("conv", 0.5)])) == other);
    assert!(pixels(&mut fresh, &plain) == before);
}

#[test]
fn int8_weights_are_changed_before_they_are_rounded() {
    use sdxl_worker::device::interface::Quantization;
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(folder.path());
    let coarse = |request: GenerateRequest| GenerateRequest { quantization: Some(Quantization::Int8), ..request };
    let plain = coarse(GenerateRequest { loras: None, ..small(&[]) });
    let before = pixels(&mut worker, &plain);
    let changed = worker.draw(&coarse(small(&[("kohya", 1.0)]))).remove(0).0;
    let exact = worker.draw(&small(&[("kohya", 1.0)])).remove(0).0;
    let distance = distance(&changed, &exact);
    println!("int8 with a LoRA against f32 with it: {distance:.2e}");
    assert!(distance < 0.3, "{distance}");
    assert!(pixels(&mut worker, &plain) == before);
}

#[test]
fn what_is_not_changed_is_shared() {
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
    assert!(encoders[1] < encoder[0] / 2, "{encoders:?}");
    pixels(&mut worker, &small(&[("unet", 1.0)]));
    let (unets, encoders) = held(&worker);
    assert!(unets.len() == 2 && unets[1] < unet[0] / 2, "{unets:?}");
    assert_eq!(encoders.len(), 2, "the prompt was encoded before");
}

#[test]
fn files_that_change_nothing_are_refused_with_the_reason() {
    use sdxl_worker::context::Context;
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
            inference.latents(&plan, plan.seeds[0], &placement, &mut worker.managers, &Context::detached()).map(drop)
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
fn weights_by_component_and_block_are_those_of_files_that_have_only_them() {
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
    let whole = LoraWish { model: Some("kohya".to_owned()), ..LoraWish::default() };
    let mut check = |wish: LoraWish, same: &[(&str, f64)]| {
        let request = GenerateRequest { loras: Some(LoraWishes(vec![wish.clone()])), ..small(&[]) };
        assert!(pixels(&mut worker, &request) == pixels(&mut worker, &small(same)), "{wish:?}");
    };
    check(LoraWish { weight: Some(0.0), unet_weight: Some(0.6), ..whole.clone() }, &[("only_unet", 0.6)]);
    check(LoraWish { unet_weight: Some(0.0), ..whole.clone() }, &[("only_first", 1.0), ("only_second", 1.0)]);
    let second = LoraWish { weight: Some(0.0), text_encoder_2_weight: Some(2.0), ..whole.clone() };
    check(second, &[("only_second", 2.0)]);
    let blocks = [("down_blocks", 0.0), ("up_blocks", 0.0), ("mid_block", 0.5)];
    let blocks = blocks.into_iter().map(|(name, weight)| (name.to_owned(), weight)).collect();
    check(LoraWish { text_encoder_weight: Some(0.0), blocks: Some(blocks), ..whole.clone() }, &[("only_mid", 0.5)]);
    // In the prompt: the first weight is the encoders', the second the UNet's.
    let tagged =
        GenerateRequest { prompt: Some("a lighthouse<lora:kohya:0:0.6>".to_owned()), loras: None, ..small(&[]) };
    assert!(pixels(&mut worker, &tagged) == pixels(&mut worker, &small(&[("only_unet", 0.6)])));
}
