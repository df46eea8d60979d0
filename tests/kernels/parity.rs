//! Compares every kernel with its reference on odd shapes, and with f64 where exactness is promised, and tests operands that
//! do not fit.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use sdxl_worker::kernels::simd::{self, SimdLevel};
use sdxl_worker::kernels::{
    self, Activation, Conv2d, ConvShape, Epilogue, GroupNorm, LayerNorm, Linear, Mask, Padding, reference,
};

const WEIGHTS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// xorshift64*: the same cases in every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.next() >> 33) as usize % of.len()]
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.pick(&[true, false])
    }

    /// About normal: the sum of four uniforms.
    fn value(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
        sum * 1.7
    }

    pub(crate) fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| self.value()).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    /// Scaled so that results stay near 1.
    pub(crate) fn weight(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let depth: usize = shape[1..].iter().product();
        let scale = 1.0 / (depth.max(1) as f64).sqrt();
        (self.tensor(shape, DType::F32) * scale).unwrap().to_dtype(dtype).unwrap()
    }
}

pub(crate) fn numbers(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Checks the largest difference, relative to the largest expected number.
pub(crate) fn close(what: &str, got: Result<Tensor>, expected: Result<Tensor>) {
    let (got, expected) = (got.unwrap_or_else(|e| panic!("{what}: {e}")), expected.unwrap());
    assert_eq!(got.dims(), expected.dims(), "{what}");
    assert_eq!(got.dtype(), expected.dtype(), "{what}");
    let tolerance = if got.dtype() == DType::F32 { 1e-5 } else { 1e-2 };
    let (a, b) = (numbers(&got), numbers(&expected));
    let top = b.iter().fold(1e-6_f32, |top, x| top.max(x.abs()));
    let (mut worst, mut at) = (0.0_f32, 0);
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let error = (a - b).abs() / top;
        if error.is_nan() || error > worst {
            (worst, at) = (error, i);
            if error.is_nan() {
                break;
            }
        }
    }
    assert!(
        worst <= tolerance,
        "{what}: error {worst:e} of {} {:?} at {at}: got {}, expected {}",
        got.dtype().as_str(),
        got.dims(),
        a[at],
        b[at]
    );
}

pub(crate) struct RandomEpilogue {
    per_sample: Option<Tensor>,
    activation: Option<Activation>,
    residual: Option<Tensor>,
}

impl RandomEpilogue {
    pub(crate) fn new(dice: &mut Dice, out: &[usize], dtype: DType) -> Self {
        let (batch, outputs) = (out[0], out[out.len() - 1]);
        Self {
            per_sample: (out.len() > 1 && dice.coin()).then(|| dice.tensor(&[batch, outputs], dtype)),
            activation: dice.pick(&[None, Some(Activation::Silu), Some(Activation::Gelu), Some(Activation::QuickGelu)]),
            residual: dice.coin().then(|| dice.tensor(out, dtype)),
        }
    }

    pub(crate) fn epilogue(&self) -> Epilogue<'_> {
        Epilogue { per_sample: self.per_sample.as_ref(), activation: self.activation, residual: self.residual.as_ref() }
    }
}

#[test]
fn linear_matches_the_reference() {
    at_every_level("linear", |_, brief| check_linear(72, brief));
}

fn check_linear(cases: usize, brief: bool) {
    let mut dice = Dice(1);
    for case in 0..if brief { cases / 6 } else { cases } {
        let dtype = if brief { DType::BF16 } else { dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]) };
        let weights = if brief { DType::BF16 } else { WEIGHTS[case % 3] };
        let (inputs, outputs) = (dice.pick(&[1, 3, 16, 33, 320, 1100]), dice.pick(&[1, 2, 5, 64, 100, 1000]));
        let front = dice.pick(&[&[1][..], &[3], &[1, 77], &[2, 1], &[3, 5, 7], &[2, 300], &[1, 900]]);
        let shape = |last| [front, &[last]].concat();
        let x = dice.tensor(&shape(inputs), dtype);
        let weight = dice.weight(&[outputs, inputs], weights);
        let bias = dice.coin().then(|| dice.tensor(&[outputs], DType::F32));
        let epilogue = RandomEpilogue::new(&mut dice, &shape(outputs), dtype);
        let layer = Linear::new(weight.clone(), bias.clone()).unwrap();
        let what = format!("linear {case}: {front:?} {inputs} to {outputs}, {dtype:?} with {weights:?}");
        let expected = reference::linear(&x, &weight, bias.as_ref(), epilogue.epilogue());
        close(&what, layer.forward_with(&x, epilogue.epilogue()), expected);
        if outputs % 2 == 0 {
            // The reference computes in f32, because the fused layer does not round between its two parts.
            let wide = x.to_dtype(DType::F32).unwrap();
            let whole = reference::linear(&wide, &weight, bias.as_ref(), Epilogue::default());
            let expected = whole.and_then(|y| reference::geglu(&y)).and_then(|y| y.to_dtype(dtype));
            close(&format!("gated {what}"), layer.forward_geglu(&x), expected);
        }
    }
}

#[test]
fn long_sums_lose_few_digits() {
    const DEPTH: usize = 2048;
    let mut dice = Dice(2_048);
    let (x, weight) = (dice.tensor(&[64, DEPTH], DType::F32), dice.weight(&[48, DEPTH], DType::F32));
    let exact: Vec<f64> = {
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        wide(&x).matmul(&wide(&weight).t().unwrap()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let ours = numbers(&Linear::new(weight, None).unwrap().forward(&x).unwrap());
    let squares: f64 = ours.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let error = (squares / exact.len() as f64).sqrt();
    // Results are about 1 in size; torch's product is off by 3.4e-7.
    assert!(error < 2.6e-7, "root mean square error {error:e}");
}

#[test]
fn convolution_matches_the_reference() {
    at_every_level("convolution", |_, brief| check_convolution(72, brief));
}

fn check_convolution(cases: usize, brief: bool) {
    let mut dice = Dice(2);
    for case in 0..if brief { cases / 6 } else { cases } {
        let dtype = if brief { DType::BF16 } else { dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]) };
        let weights = if brief { DType::BF16 } else { WEIGHTS[case % 3] };
        let shape = ConvShape {
            inputs: dice.pick(&[1, 3, 4, 9, 32, 130]),
            outputs: dice.pick(&[1, 3, 4, 17, 64, 160]),
            kernel: dice.pick(&[1, 2, 3, 3, 5]),
            stride: dice.pick(&[1, 1, 2]),
            padding: Padding {
                top: dice.pick(&[0, 1, 2]),
                bottom: dice.pick(&[0, 1, 2]),
                left: dice.pick(&[0, 1, 2]),
                right: dice.pick(&[0, 1, 3]),
            },
        };
        let batch = dice.pick(&[1, 2, 3]);
        let least = shape.kernel;
        let (height, width) = (dice.pick(&[least, 5, 8, 19]), dice.pick(&[least, 7, 16, 31]));
        compare_convolution(&mut dice, case, [batch, height, width], shape, (dtype, weights));
    }
}

/// Compares a convolution of random numbers with the reference, with and without an epilogue.
fn compare_convolution(
    dice: &mut Dice,
    case: usize,
    [batch, height, width]: [usize; 3],
    shape: ConvShape,
    (dtype, weights): (DType, DType),
) {
    let x = dice.tensor(&[batch, height, width, shape.inputs], dtype);
    let weight = dice.weight(&[shape.outputs, shape.inputs, shape.kernel, shape.kernel], weights);
    let bias = dice.coin().then(|| dice.tensor(&[shape.outputs], DType::F32));
    let layer = Conv2d::new(&weight, bias.clone(), shape).unwrap();
    let transposed = weight.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
    let bare = reference::conv2d(&x, &transposed, bias.as_ref(), shape, Epilogue::default()).unwrap();
    let what = format!("convolution {case}: [{batch}, {height}, {width}], {shape:?}, {dtype:?} with {weights:?}");
    let epilogue = RandomEpilogue::new(dice, bare.dims(), dtype);
    let expected = reference::conv2d(&x, &transposed, bias.as_ref(), shape, epilogue.epilogue());
    close(&what, layer.forward_with(&x, epilogue.epilogue()), expected);
    close(&what, layer.forward(&x), Ok(bare));
}

/// The feature maps are large enough for Winograd.
#[test]
fn large_3x3_convolution_matches_the_reference() {
    at_every_level("large convolution", |_, brief| {
        let mut dice = Dice(22);
        for case in 0..if brief { 3 } else { 20 } {
            let dtype = if brief { DType::BF16 } else { dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]) };
            let weights = if brief { DType::BF16 } else { WEIGHTS[case % 3] };
            let (inputs, outputs) = (dice.pick(&[64, 96, 160, 288]), dice.pick(&[64, 65, 100, 160, 544]));
            let shape = ConvShape { inputs, outputs, kernel: 3, stride: 1, padding: Padding::same(1) };
            let size = dice.pick(&[
                [1, 32, 32],
                [2, 33, 37],
                [3, 32, 35],
                [1, 41, 26],
                [1, 1, 1031],
                [1, 1030, 1],
                [2, 2, 700],
            ]);
            compare_convolution(&mut dice, case, size, shape, (dtype, weights));
        }
    });
}

#[test]
fn convolution_of_one_pixel_is_its_product_with_the_kernel_center() {
    let mut dice = Dice(3);
    let shape = ConvShape { inputs: 1, outputs: 1, kernel: 3, stride: 1, padding: Padding::same(1) };
    let (x, weight) = (dice.tensor(&[1, 1, 1, 1], DType::F32), dice.tensor(&[1, 1, 3, 3], DType::F32));
    let expected = numbers(&x)[0] * numbers(&weight)[4];
    let got = numbers(&Conv2d::new(&weight, None, shape).unwrap().forward(&x).unwrap());
    assert_eq!(got, [expected]);
}

#[test]
fn attention_matches_the_reference() {
    at_every_level("attention", |_, brief| check_attention(48, brief));
}

fn check_attention(cases: usize, brief: bool) {
    let mut dice = Dice(4);
    for case in 0..if brief { cases / 6 } else { cases } {
        let dtype = if brief { DType::BF16 } else { dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]) };
        let (batch, heads) = (dice.pick(&[1, 2, 3]), dice.pick(&[1, 2, 5]));
        let depth = dice.pick(&[1, 8, 13, 40, 64, 160]);
        let queries = dice.pick(&[1, 5, 77, 250, 500]);
        let (keys, mask) = match dice.coin() {
            true => (queries, Mask::Causal),
            false => (dice.pick(&[1, 3, 77, 400, 900]), Mask::None),
        };
        let channels = heads * depth;
        let q = dice.tensor(&[batch, queries, channels], dtype);
        let (k, v) = match dice.coin() {
            true => (dice.tensor(&[batch, keys, channels], dtype), dice.tensor(&[batch, keys, channels], dtype)),
            false => {
                // Halves of one projection: not contiguous.
                let both = dice.tensor(&[batch, keys, 2 * channels], dtype);
                (both.narrow(2, 0, channels).unwrap(), both.narrow(2, channels, channels).unwrap())
            }
        };
        // Large scores move the running maximum.
        let q = (q * 4.0).unwrap();
        let what = format!("attention {case}: {batch}×{heads} heads of {depth}, {queries} on {keys}, {mask:?}");
        let expected = reference::attention(&q, &k, &v, heads, mask);
        close(&what, kernels::attention(&q, &k, &v, heads, mask), expected);
    }
    for (queries, depth) in [(700, 512), (1500, 64)].into_iter().filter(|_| !brief) {
        let mut draw = || dice.tensor(&[1, queries, depth], DType::F32);
        let (q, k, v) = (draw(), draw(), draw());
        let expected = reference::attention(&q, &k, &v, 1, Mask::None);
        close("one wide head", kernels::attention(&q, &k, &v, 1, Mask::None), expected);
    }
}

/// `(t - mean) / √(variance + 1e-5)` over some axes, in f64.
fn exact(t: &Tensor, over: &[usize]) -> Tensor {
    let t = t.to_dtype(DType::F64).unwrap();
    let d = t.broadcast_sub(&t.mean_keepdim(over).unwrap()).unwrap();
    let variance = (d.sqr().unwrap().mean_keepdim(over).unwrap() + 1e-5).unwrap();
    d.broadcast_div(&variance.sqrt().unwrap()).unwrap()
}

#[test]
fn norms_match_f64() {
    let mut dice = Dice(5);
    for case in 0..40 {
        let dtype = dice.pick(&[DType::F32, DType::F32, DType::BF16, DType::F16]);
        let (groups, of_group) = (dice.pick(&[1, 2, 5, 32]), dice.pick(&[1, 3, 10]));
        let channels = groups * of_group;
        let front = dice.pick(&[&[1, 1][..], &[3, 7], &[2, 9, 13], &[1, 64, 80], &[3, 40, 31]]);
        let x = dice.tensor(&[front, &[channels]].concat(), dtype);
        let (weight, bias) = (dice.tensor(&[channels], DType::F32), dice.tensor(&[channels], DType::F32));
        let what = format!("norm {case}: {:?} in {groups} groups, {dtype:?}", x.dims());
        let norm = GroupNorm::new(&weight, &bias, groups, 1e-5).unwrap();
        // The reference norm is off by 1e-5 itself if a spread is small compared with the mean.
        let normal = exact(&x.reshape((x.dim(0).unwrap(), (), groups, of_group)).unwrap(), &[1, 3]);
        let normal = normal.to_dtype(DType::F32).unwrap().reshape(x.shape()).unwrap();
        let expected = normal.broadcast_mul(&weight).unwrap().broadcast_add(&bias).unwrap();
        close(&what, norm.forward(&x), expected.to_dtype(dtype));
        let with_silu = reference::activation(Activation::Silu, &expected).unwrap();
        close(&what, norm.forward_silu(&x), with_silu.to_dtype(dtype));
        let rows = x.dim(1).unwrap();
        let parts = [x.narrow(1, 0, rows / 2 + rows % 2).unwrap(), x.narrow(1, rows - rows / 2, rows / 2).unwrap()];
        let mut statistics = norm.statistics(&parts[0]).unwrap();
        if rows > 1 {
            statistics.merge(&norm.statistics(&parts[1]).unwrap());
        }
        let by_parts: Vec<Tensor> = (parts.iter().filter(|part| part.elem_count() > 0))
            .map(|part| norm.forward_silu_by(part, &statistics).unwrap())
            .collect();
        close(&format!("{what} in parts"), Tensor::cat(&by_parts, 1), with_silu.to_dtype(dtype));
        if channels > 1 {
            let normal = exact(&x, &[x.rank() - 1]).to_dtype(DType::F32).unwrap();
            let expected = normal.broadcast_mul(&weight).unwrap().broadcast_add(&bias).unwrap();
            close(&what, LayerNorm::new(&weight, &bias, 1e-5).unwrap().forward(&x), expected.to_dtype(dtype));
        }
    }
}

#[test]
fn norms_are_exact_far_from_zero() {
    let mut dice = Dice(6);
    let (rows, channels, groups) = (3000, 64, 4);
    let x = (dice.tensor(&[1, rows, channels], DType::F32) + 300.0).unwrap();
    let (weight, bias) =
        (Tensor::ones(channels, DType::F32, &Device::Cpu), Tensor::zeros(channels, DType::F32, &Device::Cpu));
    let (weight, bias) = (weight.unwrap(), bias.unwrap());
    let check = |what: &str, got: Tensor, expected: Tensor| {
        let error = (got.to_dtype(DType::F64).unwrap() - expected.reshape(got.shape()).unwrap())
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap();
        let error: f64 = error.to_scalar().unwrap();
        assert!(error <= 2e-6, "{what}: {error:e}");
    };
    let grouped = x.reshape((1, rows, groups, channels / groups)).unwrap();
    let got = GroupNorm::new(&weight, &bias, groups, 1e-5).unwrap().forward(&x).unwrap();
    check("group norm", got, exact(&grouped, &[1, 3]));
    let got = LayerNorm::new(&weight, &bias, 1e-5).unwrap().forward(&x).unwrap();
    check("layer norm", got, exact(&x, &[2]));
}

#[test]
fn activations_are_exact_to_a_millionth() {
    let x: Vec<f32> = (-9000..=9000).map(|i| i as f32 / 1000.0).collect();
    let x = Tensor::new(x, &Device::Cpu).unwrap();
    let wide = x.to_dtype(DType::F64).unwrap();
    let sigmoid = |t: &Tensor| ((t.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip()).unwrap();
    let cases = [
        (Activation::Silu, (&wide * sigmoid(&wide)).unwrap()),
        (Activation::QuickGelu, (&wide * sigmoid(&(&wide * 1.702).unwrap())).unwrap()),
        (Activation::Gelu, wide.gelu_erf().unwrap()),
    ];
    for (kind, expected) in cases {
        let got: Vec<f32> = kind.apply(&x).unwrap().to_vec1().unwrap();
        let expected: Vec<f64> = expected.to_vec1().unwrap();
        for ((got, expected), i) in got.iter().zip(expected).zip(-9000..) {
            let error = (f64::from(*got) - expected).abs();
            let x = f64::from(i) / 1000.0;
            // In GELU's far tail the rounding of x² grows in the exponent, and beyond -6 the reference, 1 + erf, loses digits.
            let allowed = match kind {
                Activation::Gelu if x < -6.0 => 1e-12,
                Activation::Gelu if x < -4.0 => 3e-6 * expected.abs(),
                _ => 1e-6 * expected.abs(),
            };
            assert!(error <= allowed.max(1e-30), "{kind:?} of {x}: got {got}, expected {expected}, error {error:e}");
        }
    }
    let odd = Tensor::new(&[f32::NAN, 1e30, -1e30, f32::INFINITY], &Device::Cpu).unwrap();
    for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
        let got: Vec<f32> = kind.apply(&odd).unwrap().to_vec1().unwrap();
        assert!(
            got[0].is_nan() && got[1] == 1e30 && got[2].abs() < 1e-6 && got[3] == f32::INFINITY,
            "{kind:?}: {got:?}"
        );
    }
}

#[test]
fn upsample_and_concat_copy_exactly() {
    let mut dice = Dice(7);
    for dtype in WEIGHTS {
        for (height, width) in [(4, 6), (5, 7), (13, 8), (1, 1), (40, 50)] {
            let x = dice.tensor(&[2, 3, 4, 5], dtype);
            let got = kernels::upsample_nearest(&x, height, width).unwrap();
            assert_eq!(numbers(&got), numbers(&reference::upsample_nearest(&x, height, width).unwrap()));
        }
        let (a, b) = (dice.tensor(&[2, 40, 31, 7], dtype), dice.tensor(&[2, 40, 31, 12], dtype));
        let got = kernels::concat_channels(&a, &b).unwrap();
        assert_eq!(numbers(&got), numbers(&Tensor::cat(&[&a, &b], 3).unwrap()));
        assert_eq!(got.dtype(), dtype);
    }
}

#[test]
fn views_give_the_results_of_their_copies() {
    let _held = LEVEL.lock().unwrap_or_else(PoisonError::into_inner);
    let mut dice = Dice(8);
    let x = dice.tensor(&[2, 12, 10, 16], DType::F32).transpose(1, 2).unwrap().narrow(3, 4, 8).unwrap();
    let copy = Tensor::from_vec(numbers(&x.contiguous().unwrap()), x.dims(), &Device::Cpu).unwrap();
    let shape = ConvShape { inputs: 8, outputs: 5, kernel: 3, stride: 1, padding: Padding::same(1) };
    let conv = Conv2d::new(&dice.tensor(&[5, 8, 3, 3], DType::BF16), None, shape).unwrap();
    let ones = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
    let norm = GroupNorm::new(&ones, &ones, 4, 1e-5).unwrap();
    let layer = Linear::new(dice.tensor(&[6, 8], DType::F32), None).unwrap();
    let all = |x: &Tensor| {
        [
            conv.forward(x).unwrap(),
            norm.forward_silu(x).unwrap(),
            layer.forward(x).unwrap(),
            Activation::Gelu.apply(x).unwrap(),
            kernels::upsample_nearest(x, 20, 24).unwrap(),
            kernels::concat_channels(x, x).unwrap(),
        ]
    };
    for (a, b) in all(&x).iter().zip(&all(&copy)) {
        assert_eq!(numbers(a), numbers(b));
    }
}

/// Locked by tests that set the level, or that compare bits computed at one level.
pub(crate) static LEVEL: Mutex<()> = Mutex::new(());

/// Runs `check` at every level that this machine supports, and logs the others. If the emulator runs AMX, `check` gets true
/// and should be brief.
pub(crate) fn at_every_level(what: &str, mut check: impl FnMut(SimdLevel, bool)) {
    let _held = LEVEL.lock().unwrap_or_else(PoisonError::into_inner);
    for level in SimdLevel::ALL {
        let mut by = "run";
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        if level == SimdLevel::Amx {
            by = crate::tile_emulator::install().describe();
        }
        if level.is_supported() {
            assert_eq!(simd::choose(level), level);
            check(level, by.contains("emulator"));
            eprintln!("{what}: {}: {by}", level.name());
        } else {
            eprintln!("{what}: {}: NOT RUN, this machine does not have it", level.name());
        }
        simd::choose(simd::best());
    }
}

#[test]
fn elementwise_loops_give_the_same_bits_at_every_level() {
    let mut dice = Dice(9);
    for dtype in [DType::F32, DType::BF16] {
        let x = (dice.tensor(&[2, 37, 33], dtype) * 3.0).unwrap();
        let weight = dice.tensor(&[33], DType::F32);
        let mut first = None;
        at_every_level("loops", |level, _| {
            let made = [
                GroupNorm::new(&weight, &weight, 3, 1e-5).unwrap().forward_silu(&x).unwrap(),
                LayerNorm::new(&weight, &weight, 1e-5).unwrap().forward(&x).unwrap(),
                Activation::Silu.apply(&x).unwrap(),
                Activation::Gelu.apply(&x).unwrap(),
            ];
            let made: Vec<_> = made.iter().map(numbers).collect();
            assert_eq!(*first.get_or_insert_with(|| made.clone()), made, "{level:?}");
        });
    }
}

#[test]
fn f16_weights_widen_exactly() {
    let bits: Vec<half::f16> = (0..=u16::MAX).map(half::f16::from_bits).filter(|x| x.is_finite()).collect();
    let expected: Vec<f32> = bits.iter().map(|x| x.to_f32()).collect();
    let weight = Tensor::from_vec(bits, (expected.len(), 1), &Device::Cpu).unwrap();
    let one = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(numbers(&Linear::new(weight, None).unwrap().forward(&one).unwrap()), expected);
}

#[test]
fn nan_input_gives_nan_output() {
    let mut dice = Dice(10);
    let mut values = numbers(&dice.tensor(&[1, 9, 8], DType::F32));
    values[20] = f32::NAN;
    let x = Tensor::from_vec(values, (1, 9, 8), &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let x = x.to_dtype(dtype).unwrap();
        let ones = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
        let made = [
            kernels::attention(&x, &x, &x, 2, Mask::None).unwrap(),
            GroupNorm::new(&ones, &ones, 2, 1e-5).unwrap().forward_silu(&x).unwrap(),
            LayerNorm::new(&ones, &ones, 1e-5).unwrap().forward(&x).unwrap(),
            Linear::new(dice.tensor(&[4, 8], DType::F16), None).unwrap().forward_geglu(&x).unwrap(),
        ];
        for (i, made) in made.iter().enumerate() {
            assert!(numbers(made).iter().any(|x| x.is_nan()), "{i} in {dtype:?}");
        }
    }
}

#[test]
fn empty_input_gives_empty_output() {
    let none = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let layer = Linear::new(none(&[4, 6]), None).unwrap();
    assert_eq!(layer.forward(&none(&[0, 6])).unwrap().dims(), [0, 4]);
    assert_eq!(layer.forward_geglu(&none(&[2, 0, 6])).unwrap().dims(), [2, 0, 2]);
    let bias = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
    let without = Linear::new(none(&[4, 0]), Some(bias)).unwrap();
    assert_eq!(numbers(&without.forward(&none(&[1, 0])).unwrap()), [1.0; 4]);
    let shape = ConvShape { inputs: 3, outputs: 4, kernel: 3, stride: 1, padding: Padding::same(1) };
    let conv = Conv2d::new(&none(&[4, 3, 3, 3]), None, shape).unwrap();
    assert_eq!(conv.forward(&none(&[0, 5, 5, 3])).unwrap().dims(), [0, 5, 5, 4]);
    let norm = GroupNorm::new(&none(&[4]), &none(&[4]), 2, 1e-5).unwrap();
    assert_eq!(norm.forward(&none(&[2, 0, 4])).unwrap().dims(), [2, 0, 4]);
    let norm = LayerNorm::new(&none(&[4]), &none(&[4]), 1e-5).unwrap();
    assert_eq!(norm.forward(&none(&[0, 4])).unwrap().dims(), [0, 4]);
    let (q, k) = (none(&[1, 3, 4]), none(&[1, 0, 4]));
    assert_eq!(kernels::attention(&q, &k, &k, 2, Mask::None).unwrap().dims(), [1, 3, 4]);
    assert_eq!(kernels::attention(&k, &q, &q, 2, Mask::Causal).unwrap().dims(), [1, 0, 4]);
    assert_eq!(kernels::upsample_nearest(&none(&[1, 2, 2, 0]), 4, 4).unwrap().dims(), [1, 4, 4, 0]);
    assert_eq!(kernels::concat_channels(&none(&[2, 0]), &none(&[2, 3])).unwrap().dims(), [2, 3]);
    assert_eq!(Activation::Silu.apply(&none(&[0])).unwrap().dims(), [0]);
}

#[test]
fn mismatched_shapes_are_errors() {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let check = |result: Result<Tensor>, part: &str| {
        let message = result.expect_err(part).to_string();
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    };
    let layer = Linear::new(ones(&[5, 6]), Some(ones(&[5]))).unwrap();
    check(layer.forward(&ones(&[2, 7])), "6 inputs");
    check(layer.forward(&ones(&[])), "6 inputs");
    check(layer.forward_geglu(&ones(&[2, 6])), "even number");
    check(Linear::new(ones(&[5, 6]), Some(ones(&[6]))).unwrap().forward(&ones(&[2, 6])), "bias");
    let wrong = ones(&[3, 5]);
    let per_sample = Epilogue { per_sample: Some(&wrong), ..Epilogue::default() };
    check(layer.forward_with(&ones(&[2, 6]), per_sample), "per_sample");
    let residual = Epilogue { residual: Some(&wrong), ..Epilogue::default() };
    check(layer.forward_with(&ones(&[2, 6]), residual), "residual");
    let narrow = Linear::new(ones(&[5, 6]).to_dtype(DType::F64).unwrap(), None).unwrap();
    assert_eq!(numbers(&narrow.forward(&ones(&[2, 6])).unwrap()), [6.0; 10], "weights of f64 become f32");

    let shape = ConvShape { inputs: 3, outputs: 4, kernel: 3, stride: 1, padding: Padding::default() };
    let conv = |shape| Conv2d::new(&ones(&[4, 3, 3, 3]), None, shape).unwrap();
    check(conv(shape).forward(&ones(&[1, 8, 8, 4])), "3 channels");
    check(conv(shape).forward(&ones(&[8, 8, 3])), "rank");
    check(conv(shape).forward(&ones(&[1, 2, 8, 3])), "does not fit");
    check(conv(ConvShape { stride: 0, ..shape }).forward(&ones(&[1, 8, 8, 3])), "stride");
    let wrong = Conv2d::new(&ones(&[4, 3, 3, 3]), None, ConvShape { outputs: 5, ..shape });
    check(wrong.and_then(|conv| conv.forward(&ones(&[1, 8, 8, 3]))), "kernel must be");

    let norm = |groups| GroupNorm::new(&ones(&[6]), &ones(&[6]), groups, 1e-5).unwrap();
    check(norm(4).forward(&ones(&[1, 6])), "4 groups");
    check(norm(0).forward(&ones(&[1, 6])), "0 groups");
    check(norm(2).forward_silu(&ones(&[1, 5])), "channels");
    check(norm(2).forward(&ones(&[6])), "[B, .., C]");
    check(LayerNorm::new(&ones(&[6]), &ones(&[6]), 1e-5).unwrap().forward(&ones(&[1, 5])), "channels");

    let attend = |q: &[usize], k: &[usize], v: &[usize], heads| {
        kernels::attention(&ones(q), &ones(k), &ones(v), heads, Mask::None)
    };
    check(attend(&[1, 3, 6], &[1, 3, 6], &[1, 3, 6], 4), "4 heads");
    check(attend(&[1, 3, 6], &[1, 3, 6], &[1, 3, 6], 0), "0 heads");
    check(attend(&[1, 3, 6], &[2, 3, 6], &[2, 3, 6], 2), "attention wants");
    check(attend(&[1, 3, 6], &[1, 3, 6], &[1, 4, 6], 2), "attention wants");
    check(kernels::upsample_nearest(&ones(&[1, 0, 2, 3]), 4, 4), "cannot be scaled");
    check(kernels::concat_channels(&ones(&[2, 3]), &ones(&[3, 3])), "one size");
}
