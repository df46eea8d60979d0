//! Weights in every file format: they decode to the numbers that torch and the gguf library read, and layers give the same
//! bits as layers whose weights were decoded and rounded beforehand.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use sdxl_worker::kernels::{
    Coding, Conv2d, ConvShape, Linear, LoadPolicy, Loader, Padding, StoredWeight, WeightSource, bytes_held,
};

use crate::parity::{Dice, at_every_level, numbers};

fn goldens() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/codings.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

#[test]
fn formats_decode_to_the_numbers_of_their_reference_libraries() {
    let goldens = goldens();
    at_every_level("codings", |_, _| {
        for coding in &Coding::ALL[3..] {
            let of = |part: &str| goldens[&format!("{}.{part}", coding.name())].clone();
            let (bytes, expected) = (of("bytes"), numbers(&of("numbers")));
            let weight = StoredWeight::new(bytes, *coding, 1.0, &[expected.len()]).unwrap();
            let got = numbers(&weight.numbers(DType::F32).unwrap());
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
                // Sums of a product and a minimum may be rounded once or twice.
                let close = (got - expected).abs() <= 1e-6 * expected.abs().max(1e-2);
                let blocks = coding.block().0 > 1;
                assert!(same || (blocks && close), "{} number {i}: {got}, expected {expected}", coding.name());
            }
        }
    });
}

/// One weight as it is stored, for a network that computes in a dtype, and biases of zeros.
struct One(StoredWeight, DType);

impl WeightSource for One {
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> Result<StoredWeight> {
        if name == "bias" {
            return StoredWeight::of(Tensor::zeros(shape.unwrap(), DType::F32, &Device::Cpu)?);
        }
        assert_eq!((shape, name), (Some(self.0.dims()), "weight"));
        Ok(self.0.clone())
    }

    fn contains(&self, name: &str) -> bool {
        name == "weight"
    }

    fn compute(&self) -> DType {
        self.1
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }
}

/// A weight of `shape` in a file format. Blocks repeat the blocks of the goldens.
fn weight(dice: &mut Dice, coding: Coding, scale: f32, shape: &[usize]) -> StoredWeight {
    if let Coding::F32 | Coding::F16 | Coding::Bf16 = coding {
        let dtype = match coding {
            Coding::F16 => DType::F16,
            Coding::Bf16 => DType::BF16,
            _ => DType::F32,
        };
        return StoredWeight::of(dice.weight(shape, dtype)).unwrap().times(scale);
    }
    let golden = goldens()[&format!("{}.bytes", coding.name())].to_vec1::<u8>().unwrap();
    let bytes = coding.bytes(shape.iter().product()).unwrap();
    // Eight-bit floats without infinities and NaN.
    let finite = |byte: u8| if coding.block().0 == 1 && byte & 0x7f > 0x70 { byte & 0x8f } else { byte };
    let all: Vec<u8> = golden.into_iter().cycle().take(bytes).map(finite).collect();
    let tensor = Tensor::from_vec(all, bytes, &Device::Cpu).unwrap();
    StoredWeight::new(tensor, coding, scale, shape).unwrap()
}

fn source(weight: &StoredWeight, compute: DType) -> Loader<'static> {
    Loader::new(One(weight.clone(), compute), LoadPolicy::default())
}

/// The bits of all numbers, so that NaN equals NaN.
fn bits(t: &Tensor) -> Vec<u32> {
    numbers(t).into_iter().map(f32::to_bits).collect()
}

#[test]
fn stored_linear_weights_give_the_bits_of_weights_rounded_beforehand() {
    at_every_level("stored weights", |level, brief| {
        let mut dice = Dice(41);
        let codings = if brief { &Coding::ALL[1..4] } else { &Coding::ALL[..] };
        for (i, &coding) in codings.iter().enumerate() {
            for compute in [DType::F32, DType::BF16, DType::F16] {
                let scale = if coding == Coding::E4m3 { 0.37 } else { 1.0 };
                // Large enough to stay as stored in every format.
                let (outputs, inputs) = if i % 2 == 0 { (4099, 512) } else { (1300, 1600) };
                let stored = weight(&mut dice, coding, scale, &[outputs, inputs]);
                let x = dice.tensor(&[17, inputs], compute);
                let layer = Linear::load_no_bias(&source(&stored, compute), inputs, outputs).unwrap();
                let cast = stored.numbers(compute).unwrap();
                let cast = if coding == Coding::F32 { stored.used(compute).unwrap() } else { cast };
                let expected = Linear::new(cast, None).unwrap().forward(&x).unwrap();
                let got = layer.forward(&x).unwrap();
                assert!(bits(&got) == bits(&expected), "linear {coding:?} under {compute:?} at {level:?}");
            }
        }
    });
}

#[test]
fn stored_convolution_weights_give_the_bits_of_weights_rounded_beforehand() {
    at_every_level("stored convolutions", |level, brief| {
        let mut dice = Dice(42);
        let codings = if brief { &Coding::ALL[1..3] } else { &Coding::ALL[..] };
        // Winograd, a feature map too small for it, a stride, and channels that it does not support.
        let cases = [(96, 70, 1, 17), (64, 64, 1, 9), (64, 96, 2, 18), (12, 64, 1, 17)];
        for &coding in codings {
            for compute in [DType::F32, DType::BF16, DType::F16] {
                for (inputs, outputs, stride, side) in cases.into_iter().take(if brief { 1 } else { 4 }) {
                    let shape = ConvShape { inputs, outputs, kernel: 3, stride, padding: Padding::same(1) };
                    if coding.bytes(outputs * inputs * 9).is_none() {
                        continue;
                    }
                    let stored = weight(&mut dice, coding, 1.0, &[outputs, inputs, 3, 3]);
                    let loader = source(&stored, compute);
                    let none = Tensor::zeros(outputs, DType::F32, &Device::Cpu).unwrap();
                    let layer = Conv2d::load(&loader, shape).unwrap();
                    let cast = stored.numbers(compute).unwrap();
                    let cast = if coding == Coding::F32 { stored.used(compute).unwrap() } else { cast };
                    let x = dice.tensor(&[1, side, side, inputs], compute);
                    let expected = Conv2d::new(&cast, Some(none.clone()), shape).unwrap().forward(&x).unwrap();
                    let got = layer.forward(&x).unwrap();
                    assert!(bits(&got) == bits(&expected), "{shape:?} {coding:?} under {compute:?} at {level:?}");
                }
            }
        }
    });
}

#[test]
fn bytes_that_layers_add_to_stored_weights_are_predicted() {
    let mut dice = Dice(43);
    let shape = ConvShape { inputs: 16, outputs: 64, kernel: 3, stride: 1, padding: Padding::same(1) };
    for coding in [Coding::E4m3, Coding::Q4_0, Coding::Q8_0, Coding::Q4K] {
        for compute in [DType::F32, DType::BF16] {
            // The size of SDXL's attention.
            let matrix = weight(&mut dice, coding, 1.0, &[1280, 1280]);
            let loader = source(&matrix, compute);
            Linear::load_no_bias(&loader, 1280, 1280).unwrap();
            assert_eq!(loader.take_stats().grown, 0, "{coding:?} under {compute:?}");
            assert_eq!(bytes_held(&[1280, 1280], coding, compute), coding.bytes(1280 * 1280));
            let narrow = weight(&mut dice, coding, 1.0, &[64, 16, 3, 3]);
            let loader = source(&narrow, compute);
            Conv2d::load(&loader, shape).unwrap();
            let grown = loader.take_stats().grown;
            let expected = 64 * 16 * 9 * compute.size_in_bytes();
            // A panel is padded.
            assert!((expected..=expected * 10 / 9).contains(&(narrow.bytes() + grown)), "{coding:?} under {compute:?}");
            assert_eq!(bytes_held(&[64, 16, 3, 3], coding, compute), Some(expected));
        }
    }
}
