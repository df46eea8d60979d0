//! Compares formats with the goldens of `tests/adapters/make_formulas.py`, which checks them against LyCORIS and PEFT.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::context::Context;
use crate::model::lora::formats::detect;
use crate::model::lora::formats::task::{MergeTask, Parts};
use crate::noise::{NoiseSource, RngKind};

/// Cases by name and kind of layer, with their parts and layers.
pub(crate) struct Goldens {
    tensors: HashMap<String, Tensor>,
    pub(crate) cases: BTreeMap<(String, String), Parts>,
}

impl Goldens {
    pub(crate) fn read() -> Self {
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

    pub(crate) fn base(&self, kind: &str, tensor: &str) -> &Tensor {
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
#[expect(clippy::print_stdout, reason = "a test tells what it measured")]
fn every_format_matches_its_formula() {
    let goldens = Goldens::read();
    let (mut table, mut worst, mut formats) = (String::new(), 0.0_f32, std::collections::BTreeSet::new());
    for ((case, kind), parts) in &goldens.cases {
        for tensor in ["weight", "bias"] {
            let Some((format, found)) = detect(tensor, |part| parts.contains_key(part)) else { continue };
            formats.insert(format);
            for part in parts.keys() {
                let known = found.parts.contains(&part.as_str());
                assert!(known, "{format} does not say that it reads `{part}`");
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
    let all: std::collections::BTreeSet<_> = crate::model::lora::formats::ADAPTERS.names().collect();
    println!("{table}");
    assert_eq!(formats, all, "formats without a case");
    assert!(worst <= 1e-5, "{worst:.1e} in\n{table}");
}

#[test]
fn strength_zero_leaves_layers_as_they_are() {
    let goldens = Goldens::read();
    for ((case, kind), parts) in goldens.cases.iter().filter(|(_, parts)| !parts.contains_key("rescale")) {
        let Some((_, format)) = detect("weight", |part| parts.contains_key(part)) else { continue };
        let base = goldens.base(kind, "weight");
        let task = MergeTask { layer: "layer", tensor: "weight", base, parts, strength: 0.0 };
        let got = Context::detached().perform(format.merge, task).unwrap();
        assert_eq!(error(&got, base), 0.0, "{case}, {kind}");
    }
}

/// kohya's blocks are as wide as the layer's outputs.
#[test]
fn wide_oft_blocks_are_rotations() {
    let side = 160;
    let noise = NoiseSource::new(RngKind::Cpu, &[1], 1, side, side, &Device::Cpu).draw().unwrap();
    let blocks = noise.reshape((1, side, side)).unwrap();
    let base = Tensor::eye(side, candle_core::DType::F32, &Device::Cpu).unwrap();
    let parts = Parts::from([("oft_blocks".to_owned(), blocks)]);
    let task = MergeTask { layer: "layer", tensor: "weight", base: &base, parts: &parts, strength: 1.0 };
    let (_, format) = detect("weight", |part| part == "oft_blocks").unwrap();
    let rotated = Context::detached().perform(format.merge, task).unwrap();
    let product = rotated.matmul(&rotated.t().unwrap()).unwrap();
    assert!(error(&product, &base) < 1e-5, "{}", error(&product, &base));
}
