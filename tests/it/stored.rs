//! Weights kept in their stored dtype give the same bits as weights cast beforehand; GGUF files against diffusers.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::error::Error;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::kernels::{Coding, StoredWeight};
use sdxl_worker::model::checkpoint::Part;
use sdxl_worker::runtime::config::Config;
use serde_json::json;

use super::conditioning::demo_folder;
use super::drawing::{Worker, distance};

/// Largest difference of the latents, in units of the reference's standard deviation.
const TOLERANCE: f64 = 1e-3;

/// A tensor of a file: its dtype in safetensors, its shape, its bytes.
type Entry = (&'static str, Vec<usize>, Vec<u8>);

fn worker(root: &Path) -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![root.to_owned()];
    Worker::with(&config)
}

/// The tensors of a component of the demonstration model, in f32.
fn demo(part: &str, file: &str) -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(part).join(file);
    let all = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    all.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap())).collect()
}

const PARTS: [(&str, &str); 4] = [
    ("unet", "diffusion_pytorch_model.safetensors"),
    ("vae", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors"),
    ("text_encoder_2", "model.safetensors"),
];

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn write(path: &Path, entries: &BTreeMap<String, Entry>) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in entries {
        let place = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": place }));
        data.extend_from_slice(bytes);
    }
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize(text.len().next_multiple_of(8), b' ');
    fs::write(path, [&(text.len() as u64).to_le_bytes()[..], &text, &data].concat()).unwrap();
}

/// The demonstration model as `name`, with each tensor made by `entry` from its name and values.
fn model(root: &Path, name: &str, entry: impl Fn(&str, &[f32]) -> (&'static str, Vec<u8>)) {
    let folder = root.join(name);
    demo_folder(&folder);
    for (part, file) in PARTS {
        let made = demo(part, file).into_iter().flat_map(|(name, tensor)| {
            let (dtype, bytes) = entry(&name, &numbers(&tensor));
            let own = (name.clone(), (dtype, tensor.dims().to_vec(), bytes));
            let scale = || (name.replace(".weight", ".scale_weight"), ("F32", vec![], SCALE.to_le_bytes().to_vec()));
            [Some(own), is_scaled(dtype, &name).then(scale)]
        });
        write(&folder.join(part).join(file), &made.flatten().collect());
    }
}

/// The scale of fp8 weights that have one.
const SCALE: f32 = 0.371;

fn is_scaled(dtype: &str, name: &str) -> bool {
    dtype.starts_with("F8") && name.ends_with("attn1.to_q.weight")
}

/// The image of a model in a dtype: its latents' bits and its pixels.
fn draw(worker: &mut Worker, model: &str, dtype: Dtype) -> (Vec<u32>, Vec<u8>) {
    let request = json!({
        "prompt": "A sunset over mountains", "model": model, "dtype": dtype, "seed": 42, "steps": 2,
        "width": 128, "height": 128,
    });
    let request: GenerateRequest = serde_json::from_value(request).unwrap();
    let (latents, pixels) = worker.draw(&request).remove(0);
    (numbers(&latents).into_iter().map(f32::to_bits).collect(), pixels.data)
}

fn in_f32(numbers: impl Iterator<Item = f32>) -> (&'static str, Vec<u8>) {
    ("F32", numbers.flat_map(f32::to_le_bytes).collect())
}

#[test]
fn stored_f16_and_bf16_equal_weights_cast_beforehand() {
    let root = tempfile::tempdir().unwrap();
    let half = |x: f32| f16::from_f32(x).to_f32();
    let brain = |x: f32| bf16::from_f32(x).to_f32();
    let in_f16 = |all: &mut dyn Iterator<Item = f32>| -> (&'static str, Vec<u8>) {
        ("F16", all.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect())
    };
    let in_bf16 = |all: &mut dyn Iterator<Item = f32>| -> (&'static str, Vec<u8>) {
        ("BF16", all.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect())
    };
    model(root.path(), "half", |_, all| in_f16(&mut all.iter().copied()));
    model(root.path(), "half cast", |_, all| in_bf16(&mut all.iter().copied().map(half)));
    model(root.path(), "half wide", |_, all| in_f32(all.iter().copied().map(half)));
    model(root.path(), "brain", |_, all| in_bf16(&mut all.iter().copied()));
    model(root.path(), "brain cast", |_, all| in_f16(&mut all.iter().copied().map(brain)));
    let mut worker = worker(root.path());
    for (stored, cast, dtype) in
        [("half", "half cast", Dtype::Bf16), ("half", "half wide", Dtype::F32), ("brain", "brain cast", Dtype::F16)]
    {
        let (stored_image, cast_image) = (draw(&mut worker, stored, dtype), draw(&mut worker, cast, dtype));
        assert!(stored_image == cast_image, "`{stored}` in {dtype:?} is not `{cast}`");
        println!("`{stored}` under {dtype:?}: the bits of `{cast}`");
    }
}

/// The codes of an fp8 dtype, and their values.
fn codes(coding: Coding) -> Vec<(u8, f32)> {
    let all: Vec<u8> = (0..=255).collect();
    let bytes = Tensor::from_vec(all.clone(), 256, &Device::Cpu).unwrap();
    let wide = StoredWeight::new(bytes, coding, 1.0, &[256]).unwrap().numbers(DType::F32).unwrap();
    all.into_iter().zip(numbers(&wide)).filter(|(_, number)| number.is_finite()).collect()
}

#[test]
fn fp8_weights_equal_their_decoded_values() {
    let root = tempfile::tempdir().unwrap();
    let sorted = |coding| {
        let mut codes = codes(coding);
        codes.sort_by(|a, b| a.1.total_cmp(&b.1));
        codes
    };
    let (e4m3, e5m2) = (sorted(Coding::E4m3), sorted(Coding::E5m2));
    let nearest = |codes: &[(u8, f32)], x: f32| {
        let above = codes.partition_point(|code| code.1 < x).min(codes.len() - 1);
        let (a, b) = (codes[above.saturating_sub(1)], codes[above]);
        if (a.1 - x).abs() < (b.1 - x).abs() { a } else { b }
    };
    // Some tensors of each kind, including norms and biases.
    let of = |name: &str| {
        if name.len().is_multiple_of(3) { ("F8_E5M2", &e5m2) } else { ("F8_E4M3", &e4m3) }
    };
    let scale = |name: &str| if is_scaled("F8", name) { SCALE } else { 1.0 };
    model(root.path(), "eight", |name, all| {
        let ((dtype, codes), scale) = (of(name), scale(name));
        (dtype, all.iter().map(|x| nearest(codes, x / scale).0).collect())
    });
    model(root.path(), "wide", |name, all| {
        let ((_, codes), scale) = (of(name), scale(name));
        in_f32(all.iter().map(|x| nearest(codes, x / scale).1 * scale))
    });
    let mut worker = worker(root.path());
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let (eight, wide) = (draw(&mut worker, "eight", dtype), draw(&mut worker, "wide", dtype));
        assert!(eight == wide, "eight bits in {dtype:?}");
        println!("eight bits under {dtype:?}: the bits of their numbers");
    }
}

#[derive(serde::Deserialize)]
struct Layouts {
    #[serde(rename = "made_by")]
    _made_by: String,
    config: serde_json::Value,
    request: GenerateRequest,
    cases: BTreeMap<String, Vec<TensorLayout>>,
}

/// Name, shape, type, seed, scale, minimum, and true if stored as rows of 256.
type TensorLayout = (String, Vec<u64>, String, u64, f64, f64, bool);

fn hashed(count: u64, seed: u64) -> impl Iterator<Item = u32> {
    (0..count).map(move |i| {
        let mut h = ((i + seed * 7919) as u32).wrapping_mul(2_654_435_761);
        h ^= h >> 15;
        h = h.wrapping_mul(2_246_822_519);
        h ^ (h >> 13)
    })
}

/// The bytes of a tensor, as the goldens' script makes them, and the number of its type.
fn bytes((_, shape, kind, seed, scale, least, _): &TensorLayout) -> (Vec<u8>, u32) {
    let count: u64 = shape.iter().product();
    let values = || hashed(count, *seed).map(|h| (f64::from(h) / 2_147_483_648.0 - 1.0) * scale + least);
    let (type_number, at, least_at) = match kind.as_str() {
        "F32" => return (values().flat_map(|x| (x as f32).to_le_bytes()).collect(), 0),
        "F16" => return (values().flat_map(|x| f16::from_f64(x).to_le_bytes()).collect(), 1),
        "Q4_0" => (2, 0, None),
        "Q4_1" => (3, 0, Some(2)),
        "Q5_0" => (6, 0, None),
        "Q5_1" => (7, 0, Some(2)),
        "Q8_0" => (8, 0, None),
        "Q2_K" => (10, 80, Some(82)),
        "Q3_K" => (11, 108, None),
        "Q4_K" => (12, 0, Some(2)),
        "Q5_K" => (13, 0, Some(2)),
        _ => (14, 208, None),
    };
    let coding = Coding::ALL.into_iter().find(|coding| coding.name() == kind.to_lowercase()).unwrap();
    let size = coding.block().1;
    let length = coding.bytes(usize::try_from(count).unwrap()).unwrap();
    let mut all: Vec<u8> = hashed(length as u64, *seed).map(|h| h as u8).collect();
    for block in all.chunks_exact_mut(size) {
        block[at..at + 2].copy_from_slice(&f16::from_f64(*scale).to_le_bytes());
        if let Some(at) = least_at {
            block[at..at + 2].copy_from_slice(&f16::from_f64(*least).to_le_bytes());
        }
    }
    (all, type_number)
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A GGUF file as ComfyUI-GGUF writes it, with a configuration in its metadata.
fn gguf(config: &serde_json::Value, tensors: &[TensorLayout]) -> Vec<u8> {
    let mut properties = vec![
        [text("general.architecture"), 8_u32.to_le_bytes().to_vec(), text("sdxl")].concat(),
        [text("general.quantization_version"), 4_u32.to_le_bytes().to_vec(), 2_u32.to_le_bytes().to_vec()].concat(),
        [text("config.unet"), 8_u32.to_le_bytes().to_vec(), text(&config.to_string())].concat(),
    ];
    let (mut infos, mut data) = (Vec::new(), Vec::new());
    for one in tensors {
        let (name, shape, .., rows) = one;
        let (bytes, kind) = bytes(one);
        let count: u64 = shape.iter().product();
        if *rows {
            let sides: Vec<u8> = shape.iter().flat_map(|side| (*side as u32).to_le_bytes()).collect();
            let list = [&9_u32.to_le_bytes()[..], &5_u32.to_le_bytes(), &(shape.len() as u64).to_le_bytes(), &sides];
            properties.push([text(&format!("comfy.gguf.orig_shape.{name}")), list.concat()].concat());
        }
        let sides = if *rows { vec![256, count / 256] } else { shape.iter().rev().copied().collect() };
        infos.extend(text(name));
        infos.extend((sides.len() as u32).to_le_bytes());
        infos.extend(sides.iter().flat_map(|side| side.to_le_bytes()));
        infos.extend(kind.to_le_bytes());
        infos.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let counts = [(tensors.len() as u64).to_le_bytes(), (properties.len() as u64).to_le_bytes()].concat();
    let mut all = [b"GGUF".to_vec(), 3_u32.to_le_bytes().to_vec(), counts, properties.concat(), infos].concat();
    all.resize(all.len().next_multiple_of(32), 0);
    [all, data].concat()
}

fn layouts() -> (PathBuf, Layouts) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stored");
    let text = fs::read_to_string(folder.join("gguf.json")).unwrap();
    (folder, serde_json::from_str(&text).unwrap())
}

#[test]
fn gguf_unets_equal_diffusers_with_decoded_weights() {
    let (folder, layouts) = layouts();
    let goldens = candle_core::safetensors::load(folder.join("gguf.safetensors"), &Device::Cpu).unwrap();
    let root = tempfile::tempdir().unwrap();
    let mut worker = worker(root.path());
    for (case, tensors) in &layouts.cases {
        fs::write(root.path().join("unet.gguf"), gguf(&layouts.config, tensors)).unwrap();
        let request =
            GenerateRequest { unet: Some("unet.gguf".to_owned()), dtype: Some(Dtype::F32), ..layouts.request.clone() };
        let (latents, _) = worker.draw(&request).remove(0);
        let distance = distance(&latents, &goldens[case]);
        println!("gguf {case:<16} {distance:>9.2e}");
        assert!(distance <= TOLERANCE, "{case}: {distance:.2e}");
    }
}

/// A file of one tensor, `properties` and `infos` as they are given.
fn hostile(counts: (u64, u64), properties: &[u8], infos: &[u8], data: usize) -> Vec<u8> {
    let start = [&b"GGUF"[..], &3_u32.to_le_bytes(), &counts.0.to_le_bytes(), &counts.1.to_le_bytes()].concat();
    let mut all = [&start[..], properties, infos].concat();
    all.resize(all.len().next_multiple_of(32) + data, 0);
    all
}

fn info(name: &str, sides: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let sides_in_bytes: Vec<u8> = sides.iter().flat_map(|side| side.to_le_bytes()).collect();
    let rank = (sides.len() as u32).to_le_bytes();
    [&text(name)[..], &rank, &sides_in_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

fn property(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name)[..], &kind.to_le_bytes(), value].concat()
}

#[test]
fn malformed_gguf_files_name_the_fault() {
    let root = tempfile::tempdir().unwrap();
    let mut worker = worker(root.path());
    let endless = [&5_u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    let (texts, many) = ([&8_u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat(), u64::MAX.to_le_bytes());
    let shape = [&5_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &7_u32.to_le_bytes()].concat();
    let odd = property("general.alignment", 4, &3_u32.to_le_bytes());
    let other = property("general.architecture", 8, &text("flux"));
    let one = |sides: &[u64], kind, offset| hostile((1, 0), &[], &info("a", sides, kind, offset), 64);
    let two = [info("a", &[8], 0, 0), info("b", &[8], 0, 0)].concat();
    let (_, layouts) = layouts();
    let whole = gguf(&layouts.config, &layouts.cases["q8_0"]);
    let cases = [
        ("as many tensors as can be counted", hostile((u64::MAX, 0), &[], &[], 0), "corrupt", "are the most"),
        ("as many properties", hostile((0, u64::MAX), &[], &[], 0), "corrupt", "are the most"),
        ("a name without an end", hostile((1, 0), &[], &many, 0), "corrupt", "is cut off"),
        ("an endless list", hostile((0, 1), &property("a", 9, &endless), &[], 64), "corrupt", ""),
        ("endless texts", hostile((0, 1), &property("a", 9, &texts), &[], 64), "corrupt", "is cut off"),
        ("an unknown property", hostile((0, 1), &property("a", 99, &[]), &[], 64), "corrupt", "unknown type 99"),
        ("an odd alignment", hostile((0, 1), &odd, &[], 64), "corrupt", "alignment 3"),
        ("another architecture", hostile((0, 1), &other, &[], 64), "unsupported", "`flux`"),
        ("an unknown type", one(&[32], 16, 0), "unsupported", "of type 16"),
        ("too many axes", one(&[1; 9], 0, 0), "corrupt", "at most 8 axes"),
        ("sides beyond counting", one(&[1 << 40, 1 << 40], 0, 0), "corrupt", "impossible shape"),
        ("a zero that hides them", one(&[0, 1 << 40, 1 << 40], 0, 0), "corrupt", "impossible shape"),
        ("half a block", one(&[48], 8, 0), "corrupt", "rows of 48 numbers"),
        ("a crooked place", one(&[8], 0, 4), "corrupt", "no multiple of 32"),
        ("a place behind the end", one(&[8], 0, 64), "corrupt", "may be cut off"),
        ("a place beyond counting", one(&[8], 0, u64::MAX - 31), "corrupt", ""),
        ("two in one place", hostile((2, 0), &[], &two, 64), "corrupt", "overlaps"),
        (
            "a shape of another count",
            hostile((1, 1), &property("comfy.gguf.orig_shape.a", 9, &shape), &info("a", &[8], 0, 0), 64),
            "corrupt",
            "shall be of shape [7]",
        ),
        ("a later version", [&b"GGUF"[..], &9_u32.to_le_bytes(), &[0; 64]].concat(), "unsupported", "version 9"),
        ("no network", one(&[8], 0, 0), "unsupported", ""),
        ("a part of a file", whole[..whole.len() - 4096].to_vec(), "corrupt", "may be cut off"),
        ("a part of a header", whole[..3000].to_vec(), "corrupt", "is cut off"),
    ];
    for (what, bytes, kind, message) in cases {
        fs::write(root.path().join("unet.gguf"), bytes).unwrap();
        let start = std::time::Instant::now();
        let separate = [(Part::Unet, Some("unet.gguf"))];
        let refused = worker.managers.model().catalog.resolve_with(None, &separate);
        let error = refused.expect_err(what);
        let text = match (&error, kind) {
            (Error::ModelCorrupt { .. }, "corrupt") | (Error::ModelUnsupported { .. }, "unsupported") => {
                error.to_string()
            }
            _ => panic!("{what}: {error:?}"),
        };
        assert!(text.contains(message), "{what}: {text}");
        assert!(start.elapsed().as_secs() < 1, "{what} took {:?}", start.elapsed());
        println!("{what}: {text}");
    }
}

#[test]
fn orphan_scales_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let mut worker = worker(root.path());
    let mut count = 0;
    let number = |x: f32| ("F32", vec![], x.to_le_bytes().to_vec());
    let mark = || ("F8_E4M3", vec![0], vec![]);
    let mut load = |more: &[(&str, Entry)]| {
        let entry = |(name, tensor): (String, Tensor)| {
            let coded = name == "conv_in.weight";
            let (dtype, bytes) =
                if coded { ("F8_E4M3", vec![0; tensor.elem_count()]) } else { in_f32(numbers(&tensor).into_iter()) };
            (name, (dtype, tensor.dims().to_vec(), bytes))
        };
        count += 1;
        let name = format!("odd {count}");
        demo_folder(&root.path().join(&name));
        let path = root.path().join(&name).join("unet/diffusion_pytorch_model.safetensors");
        let all = demo("unet", "diffusion_pytorch_model.safetensors").into_iter().map(entry);
        write(&path, &all.chain(more.iter().map(|(name, entry)| ((*name).to_owned(), entry.clone()))).collect());
        let odd = worker.managers.model().catalog.resolve(Some(&name))?;
        odd.open(Part::Unet, &sdxl_worker::context::Context::detached()).map(drop)
    };
    load(&[]).unwrap();
    load(&[("scaled_fp8", mark()), ("conv_in.scale_weight", number(0.5))]).unwrap();
    load(&[("conv_out.scale_weight", number(1.0))]).unwrap();
    for (what, more) in [
        ("of another coding", vec![("conv_out.scale_weight", number(0.5))]),
        ("of nothing", vec![("conv_inn.scale_weight", number(0.5))]),
        ("of another kind", vec![("conv_in.weight_scale_inv", number(0.5))]),
        ("declared but absent", vec![("scaled_fp8", mark())]),
    ] {
        let error = load(&more).expect_err(what);
        assert!(matches!(error, Error::ModelUnsupported { .. }), "{what}: {error:?}");
    }
}
