//! Adapter formats against their formulas: `tests/adapters/make_formulas.py`, which compares them with LyCORIS and PEFT.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

mod misfits;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};

use sdxl_worker::context::Context;
use sdxl_worker::model::lora::formats::task::{MergeTask, Parts};
use sdxl_worker::model::lora::formats::{ADAPTERS, detect};
use sdxl_worker::noise::{NoiseSource, RngKind};

/// The parts of each case, by name and kind of layer, and the layers.
struct Goldens {
    tensors: HashMap<String, Tensor>,
    cases: BTreeMap<(String, String), Parts>,
}

impl Goldens {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapters/formulas.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let mut cases: BTreeMap<_, Parts> = BTreeMap::new();
        for (name, tensor) in &tensors {
            if let [case, kind, "part", part] = name.split('/').collect::<Vec<_>>()[..] {
                let parts = cases.entry((case.to_owned(), kind.to_owned())).or_default();
                parts.insert(part.to_owned(), tensor.clone());
            }
        }
        Self { tensors, cases }
    }

    fn base(&self, kind: &str, tensor: &str) -> &Tensor {
        &self.tensors[&format!("{kind}/{tensor}")]
    }
}

/// The largest difference as a share of the largest value.
fn error(got: &Tensor, want: &Tensor) -> f32 {
    let largest = |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(got.dims(), want.dims());
    largest(&(got - want).unwrap()) / largest(want)
}

#[test]
fn every_format_equals_its_formula() {
    let goldens = Goldens::read();
    let (mut table, mut worst, mut formats) = (String::new(), 0.0_f32, BTreeSet::new());
    for ((case, kind), parts) in &goldens.cases {
        for tensor in ["weight", "bias"] {
            let Some((format, found)) = detect(tensor, |part| parts.contains_key(part)) else { continue };
            formats.insert(format);
            for part in parts.keys() {
                let known = found.parts.contains(&part.as_str());
                assert!(known, "{format} does not list `{part}`");
            }
            let base = goldens.base(kind, tensor);
            let mut errors = Vec::new();
            for strength in [0.7, -0.5, 1.0] {
                let task = MergeTask { layer: "layer", tensor, base, parts, strength };
                let got = Context::detached().perform(found.merge, task).unwrap();
                errors.push(error(&got, &goldens.tensors[&format!("{case}/{kind}/{tensor}/{strength:?}")]));
            }
            let largest = errors.into_iter().fold(0.0, f32::max);
            worst = worst.max(largest);
            table += &format!("{format:5} {case:22} {:14} {largest:.1e}\n", format!("{kind} {tensor}"));
        }
    }
    let all: BTreeSet<_> = ADAPTERS.names().collect();
    println!("{table}");
    assert_eq!(formats, all, "formats without a case");
    assert!(worst <= 1e-5, "{worst:.1e} in\n{table}");
}

#[test]
fn strength_zero_changes_nothing() {
    let goldens = Goldens::read();
    for ((case, kind), parts) in goldens.cases.iter().filter(|(_, parts)| !parts.contains_key("rescale")) {
        let Some((_, format)) = detect("weight", |part| parts.contains_key(part)) else { continue };
        let base = goldens.base(kind, "weight");
        let task = MergeTask { layer: "layer", tensor: "weight", base, parts, strength: 0.0 };
        let got = Context::detached().perform(format.merge, task).unwrap();
        assert_eq!(error(&got, base), 0.0, "{case}, {kind}");
    }
}

/// kohya's blocks are as wide as the layer has outputs.
#[test]
fn wide_oft_blocks_are_rotations() {
    let side = 160;
    let noise = NoiseSource::new(RngKind::Cpu, &[1], 1, side, side, &Device::Cpu).draw().unwrap();
    let blocks = noise.reshape((1, side, side)).unwrap();
    let base = Tensor::eye(side, candle_core::DType::F32, &Device::Cpu).unwrap();
    let parts = Parts::from([("oft_blocks".to_owned(), blocks)]);
    let task = MergeTask { layer: "layer", tensor: "weight", base: &base, parts: &parts, strength: 1.0 };
    let (_, format) = detect("weight", |part| part == "oft_blocks").unwrap();
    let rotation = Context::detached().perform(format.merge, task).unwrap();
    let product = rotation.matmul(&rotation.t().unwrap()).unwrap();
    assert!(error(&product, &base) < 1e-5, "{}", error(&product, &base));
}
