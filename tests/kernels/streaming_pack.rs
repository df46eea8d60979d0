//! Weights that stay in file order, `[outputs, inputs]`, give the same bits as packed ones: a large layer is compared with
//! small layers that have some of its outputs each.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{DType, Tensor};
use sdxl_worker::kernels::{Conv2d, ConvShape, Epilogue, Linear, Padding, reference};

use crate::parity::{Dice, RandomEpilogue, at_every_level, close, numbers};

/// Bytes below which the weights of a layer are packed.
const SMALL: usize = 1 << 20;
/// Outputs and inputs: whole and partial panels, and whole, partial and odd steps of the depth.
const SIZES: [(usize, usize); 7] =
    [(1000, 1100), (517, 1027), (33, 17_001), (640, 1280), (3001, 191), (16_411, 33), (40, 16_384)];

/// Outputs of the small layers.
fn parts(outputs: usize, row_bytes: usize) -> Vec<(usize, usize)> {
    let most = ((SMALL - 1) / row_bytes).min(outputs.div_ceil(2));
    (0..outputs).step_by(most).map(|first| (first, most.min(outputs - first))).collect()
}

#[test]
fn streamed_weights_give_the_bits_of_packed_ones() {
    at_every_level("streamed weights", |_, brief| {
        let mut dice = Dice(31);
        let rounds = if brief { 4 } else { 3 * SIZES.len() };
        for case in 0..rounds {
            let weights = if brief { DType::BF16 } else { [DType::BF16, DType::F32, DType::F16][case % 3] };
            let (outputs, inputs) = SIZES[case % SIZES.len()];
            for (rows, dtype) in [(1, DType::BF16), (3, DType::F32), (dice.pick(&[2, 15, 37]), DType::BF16)] {
                compare(&mut dice, (rows, inputs, outputs), (dtype, weights));
            }
        }
    });
}

fn compare(dice: &mut Dice, (rows, inputs, outputs): (usize, usize, usize), (dtype, weights): (DType, DType)) {
    let what = format!("{rows}×{inputs}×{outputs}, {dtype:?} with {weights:?}");
    let x = dice.tensor(&[rows, inputs], dtype);
    let weight = dice.weight(&[outputs, inputs], weights);
    assert!(weight.elem_count() * weights.size_in_bytes() >= SMALL, "{what}");
    let bias = dice.tensor(&[outputs], DType::F32);
    let layer = Linear::new(weight.clone(), Some(bias.clone())).unwrap();
    let whole = layer.forward(&x).unwrap();
    let packed = parts(outputs, inputs * weights.size_in_bytes()).into_iter().map(|(first, count)| {
        let (weight, bias) = (weight.narrow(0, first, count).unwrap(), bias.narrow(0, first, count).unwrap());
        Linear::new(weight, Some(bias)).unwrap().forward(&x).unwrap()
    });
    let packed = Tensor::cat(&packed.collect::<Vec<_>>(), 1).unwrap();
    assert_eq!(numbers(&whole), numbers(&packed), "{what}");
    let epilogue = RandomEpilogue::new(dice, &[rows, outputs], dtype);
    let expected = reference::linear(&x, &weight, Some(&bias), epilogue.epilogue());
    close(&what, layer.forward_with(&x, epilogue.epilogue()), expected);

    // An odd output is dropped; halves are whole panels or not.
    let half = outputs / 2;
    let (weight, bias) = (weight.narrow(0, 0, 2 * half).unwrap(), bias.narrow(0, 0, 2 * half).unwrap());
    let gated = Linear::new(weight.clone(), Some(bias.clone())).unwrap().forward_geglu(&x);
    let wide = reference::linear(&x.to_dtype(DType::F32).unwrap(), &weight, Some(&bias), Epilogue::default());
    close(&format!("gated {what}"), gated, wide.and_then(|y| reference::geglu(&y)).and_then(|y| y.to_dtype(dtype)));
}

#[test]
fn streamed_gates_give_the_bits_of_packed_ones() {
    at_every_level("streamed gates", |_, brief| {
        let mut dice = Dice(32);
        for weights in [DType::BF16, DType::F32, DType::F16].into_iter().take(if brief { 1 } else { 3 }) {
            for (half, inputs, rows) in [(64, 8192, 5), (96, 5461, 33), (320, 1000, 20)] {
                let x = dice.tensor(&[rows, inputs], DType::BF16);
                let weight = dice.weight(&[2 * half, inputs], weights);
                let bias = dice.tensor(&[2 * half], DType::F32);
                let whole = Linear::new(weight.clone(), Some(bias.clone())).unwrap().forward_geglu(&x).unwrap();
                let packed = (0..half).step_by(32).map(|first| {
                    let both = |t: &Tensor| {
                        let part = |first| t.narrow(0, first, 32).unwrap();
                        Tensor::cat(&[part(first), part(half + first)], 0).unwrap()
                    };
                    Linear::new(both(&weight), Some(both(&bias))).unwrap().forward_geglu(&x).unwrap()
                });
                let packed = Tensor::cat(&packed.collect::<Vec<_>>(), 1).unwrap();
                assert_eq!(numbers(&whole), numbers(&packed), "{rows}×{inputs}×2·{half} with {weights:?}");
            }
        }
    });
}

#[test]
fn large_pointwise_convolutions_match_the_reference() {
    at_every_level("large pointwise convolution", |_, brief| {
        let mut dice = Dice(33);
        let sizes = [(1000, 1100, 1, 0), (1200, 900, 2, 0), (640, 1281, 1, 1)];
        for (outputs, inputs, stride, around) in sizes.into_iter().take(if brief { 2 } else { 3 }) {
            for dtype in [DType::BF16, DType::F32] {
                let shape = ConvShape { inputs, outputs, kernel: 1, stride, padding: Padding::same(around) };
                let x = dice.tensor(&[2, 3, 5, inputs], dtype);
                let weight = dice.weight(&[outputs, inputs, 1, 1], DType::BF16);
                let transposed = weight.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
                let expected = reference::conv2d(&x, &transposed, None, shape, Epilogue::default());
                close(&format!("{shape:?}"), Conv2d::new(&weight, None, shape).unwrap().forward(&x), expected);
            }
        }
    });
}
