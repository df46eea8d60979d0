//! The kernels on SDXL's shapes. Throughput is in floating-point operations (a multiply-add is two), for norms in bytes.
//! `plain/…` is the candle composition for comparison.

use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use sdxl_worker::kernels::{
    self, Activation, Conv2d, ConvShape, Epilogue, GroupNorm, LayerNorm, Linear, Mask, Padding, plain,
};

fn tensor(shape: &[usize], dtype: DType) -> Tensor {
    let count: usize = shape.iter().product();
    let numbers: Vec<f32> = (0..count).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a tensor")
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(900));
    group
}

fn case(group: &mut BenchmarkGroup<WallTime>, name: &str, operations: usize, run: impl Fn() -> Tensor) {
    group.throughput(Throughput::Elements(operations as u64));
    group.bench_function(name, |b| b.iter(&run));
}

/// Activations and weights.
const DTYPES: [(&str, DType, DType); 3] =
    [("f32", DType::F32, DType::F32), ("f32·bf16", DType::F32, DType::BF16), ("bf16", DType::BF16, DType::BF16)];

fn linear(c: &mut Criterion) {
    let mut group = group(c, "linear");
    for (rows, inputs, outputs) in [(4096, 640, 5120), (1024, 1280, 1280), (154, 2048, 1280), (1, 1280, 1280)] {
        for (name, activations, weights) in DTYPES {
            let (x, weight) = (tensor(&[1, rows, inputs], activations), tensor(&[outputs, inputs], weights));
            let layer = Linear::new(weight.clone(), None).expect("a layer");
            let name = format!("{rows}x{inputs}x{outputs} {name}");
            let operations = 2 * rows * inputs * outputs;
            case(&mut group, &name, operations, || layer.forward(&x).expect("a product"));
            if rows == 4096 {
                case(&mut group, &format!("geglu {name}"), operations, || layer.forward_geglu(&x).expect("a product"));
            }
            if rows == 1024 {
                case(&mut group, &format!("plain/{name}"), operations, || {
                    plain::linear(&x, &weight, None, Epilogue::default()).expect("a product")
                });
            }
        }
    }
}

fn convolution(c: &mut Criterion) {
    let mut group = group(c, "convolution");
    for (inputs, outputs, side) in [(320, 320, 64), (640, 640, 32), (32, 32, 32), (128, 3, 256)] {
        for (name, activations, weights) in DTYPES {
            let shape = ConvShape { inputs, outputs, kernel: 3, stride: 1, padding: Padding::same(1) };
            let (x, weight) =
                (tensor(&[1, side, side, inputs], activations), tensor(&[outputs, inputs, 3, 3], weights));
            let layer = Conv2d::new(&weight, None, shape).expect("a layer");
            let operations = 2 * side * side * inputs * 9 * outputs;
            let name = format!("{inputs} to {outputs} at {side} {name}");
            case(&mut group, &name, operations, || layer.forward(&x).expect("a map"));
            if inputs == 640 || inputs == 32 {
                let turned = weight.permute((0, 2, 3, 1)).and_then(|w| w.contiguous()).expect("a kernel");
                case(&mut group, &format!("plain/{name}"), operations, || {
                    plain::conv2d(&x, &turned, None, shape, Epilogue::default()).expect("a map")
                });
            }
        }
    }
}

fn attention(c: &mut Criterion) {
    let mut group = group(c, "attention");
    for (heads, queries, keys, depth) in
        [(10, 1024, 1024, 64), (10, 4096, 4096, 64), (10, 4096, 77, 64), (1, 4096, 4096, 512)]
    {
        for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
            let (q, k) = (tensor(&[1, queries, heads * depth], dtype), tensor(&[1, keys, heads * depth], dtype));
            let operations = 4 * heads * queries * keys * depth;
            let name = format!("{heads}x{queries}x{keys}x{depth} {name}");
            case(&mut group, &name, operations, || kernels::attention(&q, &k, &k, heads, Mask::None).expect("tokens"));
            if queries == 1024 {
                case(&mut group, &format!("plain/{name}"), operations, || {
                    plain::attention(&q, &k, &k, heads, Mask::None).expect("tokens")
                });
            }
        }
    }
}

fn norms(c: &mut Criterion) {
    let mut group = group(c, "norm");
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let x = tensor(&[1, 128, 128, 320], dtype);
        let ones = tensor(&[320], DType::F32);
        let norm = GroupNorm::new(&ones, &ones, 32, 1e-5).expect("a norm");
        let layer = LayerNorm::new(&ones, &ones, 1e-5).expect("a norm");
        group.throughput(Throughput::Bytes((x.elem_count() * dtype.size_in_bytes()) as u64));
        group.bench_function(format!("group {name}"), |b| b.iter(|| norm.forward(&x).expect("a map")));
        group.bench_function(format!("group silu {name}"), |b| b.iter(|| norm.forward_silu(&x).expect("a map")));
        group.bench_function(format!("plain/group {name}"), |b| {
            b.iter(|| plain::group_norm(&x, &ones, &ones, 32, 1e-5).expect("a map"));
        });
        group.bench_function(format!("layer {name}"), |b| b.iter(|| layer.forward(&x).expect("a map")));
        group.bench_function(format!("gelu {name}"), |b| b.iter(|| Activation::Gelu.apply(&x).expect("a map")));
    }
}

criterion_group!(benches, linear, convolution, attention, norms);
criterion_main!(benches);
