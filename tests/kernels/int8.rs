//! INT8 layers match the quantization rule at every level, and are close to the unquantized layers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::sync::PoisonError;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use sdxl_worker::kernels::{Conv2d, ConvShape, Epilogue, Linear, LoadPolicy, Loader, Padding, reference};

use crate::parity::{Dice, LEVEL, RandomEpilogue, at_every_level, close, numbers};

/// The bytes of some numbers and the value of one step: 127 steps on either side of zero, ties to even.
fn bytes(numbers: &[f32]) -> (Vec<i32>, f32) {
    let top = numbers.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    if top < 1e-30 {
        return (vec![0; numbers.len()], 0.0);
    }
    let inverse = 127.0 / top;
    (numbers.iter().map(|x| (x * inverse).round_ties_even() as i32).collect(), top / 127.0)
}

/// The quantized rows of `[rows, length]`.
fn rows_of(t: &Tensor, length: usize) -> Vec<(Vec<i32>, f32)> {
    numbers(t).chunks(length).map(bytes).collect()
}

fn dot(a: &[i32], b: &[i32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum()
}

/// The linear layer by the quantization rule, f32, without bias: `x` is `[.., I]`, `weight` `[O, I]`.
fn linear(x: &Tensor, weight: &Tensor) -> Tensor {
    let (outputs, inputs) = weight.dims2().unwrap();
    let weights = rows_of(weight, inputs);
    let made: Vec<f32> = rows_of(x, inputs)
        .iter()
        .flat_map(|(row, step)| {
            weights.iter().map(move |(line, scale)| (dot(row, line) * f64::from(*step) * f64::from(*scale)) as f32)
        })
        .collect();
    let shape: Vec<usize> = x.dims().iter().rev().skip(1).rev().copied().chain([outputs]).collect();
    Tensor::from_vec(made, shape, &Device::Cpu).unwrap()
}

/// The convolution by the quantization rule, f32, without bias: `x` is `[B, H, W, C]`, `weight` `[O, C, K, K]`. Sums of
/// bytes are exact in f64.
fn convolution(x: &Tensor, weight: &Tensor, shape: ConvShape) -> Tensor {
    let pointwise = shape.kernel == 1 && shape.stride == 1 && shape.padding == Padding::default();
    let quantized = |t: &Tensor, length: usize| -> (Tensor, Vec<f32>) {
        let (whole, steps): (Vec<_>, Vec<_>) = rows_of(t, length).into_iter().unzip();
        let whole: Vec<f32> = whole.concat().into_iter().map(|x| x as f32).collect();
        (Tensor::from_vec(whole, t.shape(), &Device::Cpu).unwrap(), steps)
    };
    let length = if pointwise { shape.inputs } else { x.elem_count() / x.dims()[0] };
    let (x, steps) = quantized(x, length);
    let (weight, scales) = quantized(weight, shape.inputs * shape.kernel * shape.kernel);
    let transposed = weight.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
    // At most 1100 products of at most 127² are integers that f32 represents.
    let sums = reference::conv2d(&x, &transposed, None, shape, Epilogue::default()).unwrap();
    let each = sums.elem_count() / shape.outputs / steps.len();
    let made: Vec<f32> = (numbers(&sums).into_iter().enumerate())
        .map(|(i, sum)| {
            let (row, output) = (i / shape.outputs, i % shape.outputs);
            (f64::from(sum) * f64::from(steps[row / each]) * f64::from(scales[output])) as f32
        })
        .collect();
    Tensor::from_vec(made, sums.shape(), &Device::Cpu).unwrap()
}

/// Root mean square of the difference, relative to the root mean square of `b`.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let (a, b) = (numbers(a), numbers(b));
    let error: f64 = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum();
    (error / b.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

#[test]
fn int8_linear_matches_the_quantization_rule() {
    at_every_level("int8 linear", |level, brief| {
        let mut dice = Dice(21);
        for case in 0..if brief { 8 } else { 48 } {
            let dtype = dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]);
            let weights = [DType::F32, DType::BF16, DType::F16][case % 3];
            let (inputs, outputs) = (dice.pick(&[1, 3, 33, 64, 320, 1100]), dice.pick(&[1, 2, 5, 64, 100, 192]));
            let front = dice.pick(&[&[1][..], &[3], &[1, 77], &[3, 5, 7], &[2, 50]]);
            let front = if brief { &front[..1] } else { front };
            let shape = |last| [front, &[last]].concat();
            let x = dice.tensor(&shape(inputs), dtype);
            let weight = dice.weight(&[outputs, inputs], weights);
            let bias = dice.coin().then(|| dice.tensor(&[outputs], DType::F32));
            let epilogue = RandomEpilogue::new(&mut dice, &shape(outputs), dtype);
            let layer = Linear::int8(&weight, bias.clone()).unwrap();
            let what = format!("{level:?} linear {case}: {front:?} {inputs} to {outputs}, {dtype:?} with {weights:?}");
            // A layer with an identity as weight applies the epilogue alone.
            let one = Tensor::eye(outputs, DType::F32, &Device::Cpu).unwrap();
            let bare = linear(&x, &weight);
            let expected = reference::linear(&bare, &one, bias.as_ref(), epilogue.epilogue());
            close(&what, layer.forward_with(&x, epilogue.epilogue()), expected.and_then(|y| y.to_dtype(dtype)));
            if outputs % 2 == 0 {
                let whole = reference::linear(&bare, &one, bias.as_ref(), Epilogue::default());
                let gated = whole.and_then(|y| reference::geglu(&y)).and_then(|y| y.to_dtype(dtype));
                close(&format!("gated {what}"), layer.forward_geglu(&x), gated);
            }
            if inputs >= 320 && dtype == DType::F32 {
                let exact = reference::linear(&x, &weight, None, Epilogue::default()).unwrap();
                let error = distance(&bare, &exact);
                assert!(error < 0.02, "{what}: {error:.4} from the layer itself");
            }
        }
    });
}

#[test]
fn int8_convolution_matches_the_quantization_rule() {
    at_every_level("int8 convolution", |level, brief| {
        let mut dice = Dice(22);
        for case in 0..if brief { 6 } else { 36 } {
            let dtype = dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]);
            let weights = [DType::F32, DType::BF16, DType::F16][case % 3];
            let mut side = || dice.pick(&[0, 1, 2]);
            let padding = Padding { top: side(), bottom: side(), left: side(), right: side() };
            let kernel = dice.pick(&[1, 2, 3, 3]);
            let padding = if kernel == 1 && dice.coin() { Padding::default() } else { padding };
            let shape = ConvShape {
                inputs: dice.pick(&[1, 3, 9, 64, 120]),
                outputs: dice.pick(&[1, 4, 17, 64]),
                kernel,
                stride: dice.pick(&[1, 1, 2]),
                padding,
            };
            let batch = dice.pick(&[1, 2, 3]);
            let (height, width) = (dice.pick(&[kernel, 5, 8]), dice.pick(&[kernel, 7, if brief { 4 } else { 16 }]));
            let x = dice.tensor(&[batch, height, width, shape.inputs], dtype);
            let weight = dice.weight(&[shape.outputs, shape.inputs, kernel, kernel], weights);
            let bias = dice.coin().then(|| dice.tensor(&[shape.outputs], DType::F32));
            let layer = Conv2d::int8(&weight, bias.clone(), shape).unwrap();
            let what = format!("{level:?} convolution {case}: [{batch}, {height}, {width}], {shape:?}, {dtype:?}");
            let bare = convolution(&x, &weight, shape);
            let epilogue = RandomEpilogue::new(&mut dice, bare.dims(), dtype);
            let one = Tensor::eye(shape.outputs, DType::F32, &Device::Cpu).unwrap();
            let expected = reference::linear(&bare, &one, bias.as_ref(), epilogue.epilogue());
            close(&what, layer.forward_with(&x, epilogue.epilogue()), expected.and_then(|y| y.to_dtype(dtype)));
            if shape.inputs >= 64 && dtype == DType::F32 {
                let transposed = weight.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
                let exact = reference::conv2d(&x, &transposed, None, shape, Epilogue::default()).unwrap();
                let error = distance(&bare, &exact);
                assert!(error < 0.02, "{what}: {error:.4} from the layer itself");
            }
        }
    });
}

#[test]
fn int8_samples_are_independent_of_each_other() {
    let _held = LEVEL.lock().unwrap_or_else(PoisonError::into_inner);
    let mut dice = Dice(23);
    let shape = ConvShape { inputs: 70, outputs: 40, kernel: 3, stride: 1, padding: Padding::same(1) };
    let layer = Conv2d::int8(&dice.weight(&[40, 70, 3, 3], DType::BF16), None, shape).unwrap();
    let (a, b) = (dice.tensor(&[1, 9, 7, 70], DType::F32), dice.tensor(&[1, 9, 7, 70], DType::F32));
    let both = Tensor::cat(&[&a, &(b * 1000.0).unwrap()], 0).unwrap();
    let together = layer.forward(&both).unwrap().narrow(0, 0, 1).unwrap();
    assert_eq!(numbers(&together), numbers(&layer.forward(&a).unwrap()));
}

#[test]
fn int8_row_with_non_finite_input_gives_non_finite_output() {
    at_every_level("int8 non-finite", |level, _| {
        let mut dice = Dice(24);
        let layer = Linear::int8(&dice.weight(&[64, 96], DType::F32), None).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = numbers(&dice.tensor(&[3, 96], DType::F32));
            values[96 + 50] = bad;
            let x = Tensor::from_vec(values, (3, 96), &Device::Cpu).unwrap();
            let made = numbers(&layer.forward(&x).unwrap());
            let finite: Vec<bool> = made.chunks(64).map(|row| row.iter().all(|x| x.is_finite())).collect();
            assert_eq!(finite, [true, false, true], "{level:?}, {bad}");
        }
        let nothing = Tensor::zeros((2, 96), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(numbers(&layer.forward(&nothing).unwrap()), [0.0; 128], "{level:?}");
    });
}

#[test]
fn only_layers_chosen_at_load_are_quantized() {
    let mut dice = Dice(25);
    let mut tensors = HashMap::new();
    for name in ["in.linear", "out.linear"] {
        tensors.insert(format!("{name}.weight"), dice.weight(&[64, 128], DType::F32));
        tensors.insert(format!("{name}.bias"), dice.tensor(&[64], DType::F32));
    }
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let load =
        |loader: &Loader| ["in.linear", "out.linear"].map(|name| Linear::load(&loader.pp(name), 128, 64).unwrap());
    let policy = LoadPolicy {
        int8: Some(|layer, weight| layer.starts_with("in.") && weight == [64, 128]),
        ..LoadPolicy::default()
    };
    let loader = Loader::new(vb.clone(), policy);
    let quantized = load(&loader);
    assert_eq!(loader.take_stats().saved, 64 * 128 * 4 - (64 * 128 + 64 * 8));
    let x = dice.tensor(&[5, 128], DType::F32);
    let made = |layers: &[Linear; 2]| [0, 1].map(|i| numbers(&layers[i].forward(&x).unwrap()));
    let ([a, b], [exact_a, exact_b]) = (made(&quantized), made(&load(&vb.into())));
    assert_eq!(b, exact_b);
    assert_ne!(a, exact_a);
}
