//! Measures kernels on the shapes of SDXL at 1024², one CFG pair: GF/s on all threads, and the share of what this machine's
//! registers reach with the instruction that the kernel multiplies with. The best run counts, as machines are shared.
//!
//! `cargo bench --bench kernels [-- FILTER] [--cpu-features LEVEL]`

#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use sdxl_worker::kernels::simd::{self, SimdLevel};
use sdxl_worker::kernels::{self, Activation, Conv2d, ConvShape, GroupNorm, LayerNorm, Linear, Mask, Padding};

#[path = "peak/mod.rs"]
mod peak;

fn tensor(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::randn(0.0f32, 1.0, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a tensor")
}

/// The fastest run, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best) = (Instant::now(), f64::MAX);
    for done in 0.. {
        if done >= 3 && start.elapsed() > Duration::from_millis(600) {
            break;
        }
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

struct Table {
    filter: Option<String>,
    /// Peak GF/s of the registers, for f32 and for bf16 activations.
    peaks: [f64; 2],
}

impl Table {
    fn row(&self, name: &str, operations: usize, make: impl Fn(DType) -> Box<dyn FnMut()>) {
        if self.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
            return;
        }
        let cells = [DType::F32, DType::BF16].into_iter().zip(self.peaks).map(|(dtype, peak)| {
            let rate = operations as f64 / best(make(dtype)) / 1e9;
            format!("{:>8.0} {:>4.0} %", rate, rate / peak * 100.0)
        });
        println!("{name:<44}{}", cells.collect::<Vec<_>>().join("   "));
    }

    /// Measures bytes read and written, without the share of a peak.
    fn bytes(&self, name: &str, elements: usize, make: impl Fn(DType) -> Box<dyn FnMut()>) {
        if self.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
            return;
        }
        let cells = [DType::F32, DType::BF16].map(|dtype| {
            let rate = (elements * dtype.size_in_bytes()) as f64 / best(make(dtype)) / 1e9;
            format!("{rate:>8.1} GB/s")
        });
        println!("{name:<44}{}", cells.join("  "));
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let flag = arguments.iter().position(|a| a == "--cpu-features");
    if let Some(wanted) = flag.and_then(|at| arguments.get(at + 1)) {
        let level = SimdLevel::ALL.into_iter().find(|level| level.name() == wanted).expect("the name of a level");
        simd::choose(level);
    }
    let filter = if flag == Some(0) { arguments.get(2) } else { arguments.first() }.cloned();
    let level = simd::level();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{threads} threads, kernels of level {}", level.name());
    let peaks = peak::measure(threads);
    peaks.iter().for_each(|(name, rate)| println!("registers: {name} {rate:.0} G operations/s"));
    let of = |name: &str| peaks.iter().find(|(n, _)| *n == name).map_or(f64::NAN, |(_, rate)| *rate);
    let f32_peak = match level {
        SimdLevel::Portable => of("portable f32"),
        SimdLevel::Avx2 => of("avx2 f32"),
        _ => of("avx512 f32"),
    };
    let bf16_peak = if level == SimdLevel::Avx512Bf16 { of("avx512 bf16") } else { f32_peak };
    println!("\n{:<44}{:>8} {:>6}   {:>8} {:>6}", "GF/s and share of the registers'", "f32", "", "bf16", "");
    let table = Table { filter, peaks: [f32_peak, bf16_peak] };
    linears(&table, "", |weight| Linear::new(weight, None));
    convolutions(&table, "", |weight, shape| Conv2d::new(weight, None, shape));
    attentions(&table);
    gemm(&table);
    let int8_peak = if level >= SimdLevel::Avx512 { of("avx512 int8") } else { f32_peak };
    println!("\n{:<44}{:>8} {:>6}   {:>8} {:>6}", "INT8, quantizing included, activations in", "f32", "", "bf16", "");
    let int8 = Table { filter: table.filter.clone(), peaks: [int8_peak; 2] };
    linears(&int8, "int8 ", |weight| Linear::int8(&weight, None));
    convolutions(&int8, "int8 ", |weight, shape| Conv2d::int8(weight, None, shape));
    rest(&table);
}

fn linears(table: &Table, kind: &str, layer: fn(Tensor) -> candle_core::Result<Linear>) {
    let gated = [(8192, 640, 5120), (2048, 1280, 10240)];
    let plain = [
        (8192, 640, 640),
        (2048, 1280, 1280),
        (8192, 2560, 640),
        (2048, 5120, 1280),
        (512, 1280, 1280),
        (154, 2048, 1280),
        (154, 1280, 5120),
        (2, 1280, 1280),
    ];
    for (rows, inputs, outputs) in gated {
        table.row(&format!("{kind}linear geglu {rows}×{inputs}×{outputs}"), 2 * rows * inputs * outputs, |dtype| {
            let (x, weight) = (tensor(&[rows, inputs], dtype), tensor(&[outputs, inputs], dtype));
            let layer = layer(weight).expect("a layer");
            Box::new(move || drop(black_box(layer.forward_geglu(&x).expect("a product"))))
        });
    }
    for (rows, inputs, outputs) in plain {
        table.row(&format!("{kind}linear {rows}×{inputs}×{outputs}"), 2 * rows * inputs * outputs, |dtype| {
            let (x, weight) = (tensor(&[rows, inputs], dtype), tensor(&[outputs, inputs], dtype));
            let layer = layer(weight).expect("a layer");
            Box::new(move || drop(black_box(layer.forward(&x).expect("a product"))))
        });
    }
}

/// candle's own product, from the crate gemm with its AVX-512 kernels, on the shapes of the linear layers.
fn gemm(table: &Table) {
    for (rows, inputs, outputs) in [(8192, 640, 640), (2048, 1280, 1280), (8192, 2560, 640), (2048, 5120, 1280)] {
        table.row(&format!("gemm {rows}×{inputs}×{outputs}"), 2 * rows * inputs * outputs, |dtype| {
            let (x, weight) = (tensor(&[rows, inputs], dtype), tensor(&[outputs, inputs], dtype));
            let transposed = weight.t().expect("a matrix");
            Box::new(move || drop(black_box(x.matmul(&transposed).expect("a product"))))
        });
    }
}

fn convolutions(table: &Table, kind: &str, layer: fn(&Tensor, ConvShape) -> candle_core::Result<Conv2d>) {
    let shapes = [
        (2, 4, 320, 128),
        (2, 320, 320, 128),
        (2, 640, 640, 64),
        (2, 1280, 1280, 32),
        (2, 2560, 1280, 32),
        (2, 1280, 1280, 16),
        (2, 640, 640, 32),
        (2, 320, 4, 128),
        (1, 512, 512, 256),
        (1, 256, 256, 512),
        (1, 128, 128, 1024),
        (1, 128, 3, 1024),
    ];
    for (batch, inputs, outputs, side) in shapes {
        let operations = 2 * batch * side * side * inputs * 9 * outputs;
        table.row(&format!("{kind}conv 3×3 {batch}×{inputs} to {outputs} at {side}²"), operations, |dtype| {
            let shape = ConvShape { inputs, outputs, kernel: 3, stride: 1, padding: Padding::same(1) };
            let (x, weight) = (tensor(&[batch, side, side, inputs], dtype), tensor(&[outputs, inputs, 3, 3], dtype));
            let layer = layer(&weight, shape).expect("a layer");
            Box::new(move || drop(black_box(layer.forward(&x).expect("a map"))))
        });
    }
}

fn attentions(table: &Table) {
    let shapes = [
        (2, 10, 4096, 4096, 64),
        (2, 20, 1024, 1024, 64),
        (2, 10, 4096, 77, 64),
        (2, 20, 1024, 77, 64),
        (1, 1, 16384, 16384, 512),
    ];
    for (batch, heads, queries, keys, depth) in shapes {
        let operations = 4 * batch * heads * queries * keys * depth;
        let name = format!("attention {batch}×{heads} heads of {depth}, {queries} on {keys}");
        table.row(&name, operations, |dtype| {
            let (q, k) =
                (tensor(&[batch, queries, heads * depth], dtype), tensor(&[batch, keys, heads * depth], dtype));
            Box::new(move || drop(black_box(kernels::attention(&q, &k, &k, heads, Mask::None).expect("tokens"))))
        });
    }
}

fn rest(table: &Table) {
    println!("\nbytes read and written");
    let (side, channels) = (128, 320);
    let elements = 2 * side * side * channels;
    let ones = Tensor::ones(channels, DType::F32, &Device::Cpu).expect("ones");
    let map = |dtype| tensor(&[2, side, side, channels], dtype);
    let norm = GroupNorm::new(&ones, &ones, 32, 1e-5).expect("a norm");
    table.bytes("group norm and SiLU 2×320 at 128²", 3 * elements, |dtype| {
        let (x, norm) = (map(dtype), norm.clone());
        Box::new(move || drop(black_box(norm.forward_silu(&x).expect("a map"))))
    });
    let layer = LayerNorm::new(&ones, &ones, 1e-5).expect("a norm");
    table.bytes("layer norm 32768×320", 2 * elements, |dtype| {
        let (x, layer) = (map(dtype), layer.clone());
        Box::new(move || drop(black_box(layer.forward(&x).expect("a map"))))
    });
    table.bytes("SiLU", 2 * elements, |dtype| {
        let x = map(dtype);
        Box::new(move || drop(black_box(Activation::Silu.apply(&x).expect("a map"))))
    });
    table.bytes("upsample 2×320 at 128²", 5 * elements, |dtype| {
        let x = map(dtype);
        Box::new(move || drop(black_box(kernels::upsample_nearest(&x, 2 * side, 2 * side).expect("a map"))))
    });
    table.bytes("concatenate 2×320 and 320 at 128²", 4 * elements, |dtype| {
        let x = map(dtype);
        Box::new(move || drop(black_box(kernels::concat_channels(&x, &x).expect("a map"))))
    });
}
