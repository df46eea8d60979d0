//! Wrong adapter tensors: a format gives a tensor of the layer's shape or `model_unsupported`.

use candle_core::{Device, Tensor};

use sdxl_worker::context::Context;
use sdxl_worker::model::lora::formats::detect;
use sdxl_worker::model::lora::formats::task::{MergeTask, Parts, part_limit};

use super::Goldens;

fn shaped(shape: &[usize], value: f32) -> Tensor {
    Tensor::full(value, shape, &Device::Cpu).unwrap()
}

/// Merges `parts` into the layer, and gives the message of an error.
fn check(goldens: &Goldens, kind: &str, parts: &Parts, what: &str) -> Option<String> {
    let mut refused = None;
    for tensor in ["weight", "bias"] {
        let Some((_, format)) = detect(tensor, |part| parts.contains_key(part)) else { continue };
        let base = goldens.base(kind, tensor);
        let task = MergeTask { layer: "layer", tensor, base, parts, strength: 0.7 };
        match Context::detached().perform(format.merge, task) {
            Ok(merged) => assert_eq!(merged.dims(), base.dims(), "{what}"),
            Err(error) => {
                assert_eq!(error.code(), "model_unsupported", "{what}: {error}");
                refused = Some(error.to_string());
            }
        }
    }
    refused
}

#[test]
fn parts_of_every_wrong_shape_are_misfits() {
    let goldens = Goldens::read();
    let shapes: &[&[usize]] = &[
        &[],
        &[0],
        &[1],
        &[7],
        &[16],
        &[0, 12],
        &[16, 0],
        &[1, 1],
        &[5, 7],
        &[12, 16],
        &[700, 700],
        &[1, 16],
        &[0, 0, 0],
        &[1, 1, 1],
        &[2, 8, 7],
        &[3, 5, 5],
        &[16, 1, 1],
        &[1, 1, 1, 1],
        &[0, 4, 4, 4],
        &[5, 4, 4, 4],
        &[40, 4, 4, 4],
        &[1, 16, 1, 1],
        &[4, 4, 3, 3, 1],
        &[1, 2, 1, 2, 1, 2],
    ];
    let (mut tried, mut refused) = (0, 0);
    for ((case, kind), parts) in &goldens.cases {
        for name in parts.keys() {
            for shape in shapes {
                let mut wrong = parts.clone();
                wrong.insert(name.clone(), shaped(shape, 0.5));
                tried += 1;
                refused +=
                    usize::from(check(&goldens, kind, &wrong, &format!("{case}, {kind}, {name} {shape:?}")).is_some());
            }
            let mut missing = parts.clone();
            missing.remove(name);
            tried += 1;
            refused += usize::from(check(&goldens, kind, &missing, &format!("{case}, {kind}, no {name}")).is_some());
        }
    }
    println!("{refused} of {tried} refused");
    assert!(refused * 10 > tried * 7, "{refused} of {tried} refused");
}

#[test]
fn values_that_are_not_finite_are_misfits() {
    let goldens = Goldens::read();
    for ((case, kind), parts) in &goldens.cases {
        for (name, part) in parts {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut wrong = parts.clone();
                wrong.insert(name.clone(), shaped(part.dims(), value));
                let what = format!("{case}, {kind}, {name} of {value}");
                let message = check(&goldens, kind, &wrong, &what);
                // The alpha of whole Kronecker factors does not count.
                let unread = case == "lokr of whole factors" && name == "alpha";
                assert!(unread || message.is_some_and(|message| message.contains("not finite")), "{what}");
            }
        }
    }
}

#[test]
fn layers_that_a_format_does_not_change_are_misfits() {
    let goldens = Goldens::read();
    for ((case, kind), parts) in goldens.cases.iter().filter(|((case, _), _)| case != "norm" && case != "full") {
        let (_, format) = detect("weight", |part| parts.contains_key(part)).unwrap();
        for shape in [&[][..], &[16], &[0, 12], &[16, 0], &[3, 5], &[16, 12, 0, 3]] {
            let base = shaped(shape, 1.0);
            let task = MergeTask { layer: "layer", tensor: "weight", base: &base, parts, strength: 1.0 };
            let error = Context::detached().perform(format.merge, task).unwrap_err();
            assert_eq!(error.code(), "model_unsupported", "{case}, {kind}, {shape:?}: {error}");
        }
    }
}

#[test]
fn parts_are_limited_by_their_layer() {
    assert_eq!(part_limit(&[320]), 320);
    assert_eq!(part_limit(&[4, 320, 3, 3]), 512 * 512 * 9);
    assert_eq!(part_limit(&[10240, 1280]), 10240 * 10240);
    assert_eq!(part_limit(&[usize::MAX, 2, 3, 3]), usize::MAX);
}
