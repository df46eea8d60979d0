//! Text encoders, UNet and VAE, compared with diffusers and transformers. `tests/goldens/make_networks.py` makes the
//! goldens and names the versions.

#![expect(clippy::print_stdout, reason = "the measured errors are the test's report")]
#![expect(clippy::unwrap_used, reason = "a test may panic, and so may what it calls")]

mod configurations;

use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::kernels::Loader;
use sdxl_worker::model::networks::clip::{ClipConfig, ClipTextModel};
use sdxl_worker::model::networks::embeddings::Sinusoid;
use sdxl_worker::model::networks::interventions::Steering;
use sdxl_worker::model::networks::unet::{Text, Unet, UnetConfig, UnetInput};
use sdxl_worker::model::networks::vae::{Extent, VaeConfig, VaeDecoder, VaeEncoder};
use serde_json::Value;

const UNETS: [&str; 6] =
    ["refiner", "conv_projection", "uneven_layers", "inpaint_odd_size", "no_mid_block", "plain_mid_block"];
const VAES: [&str; 2] = ["vae", "vae_no_quant"];

/// Dtypes of activations and weights, and the largest error relative to the largest value.
#[derive(Clone, Copy)]
struct Precision {
    activations: DType,
    weights: DType,
    tolerance: f64,
}

const PRECISIONS: [Precision; 3] = [
    Precision { activations: DType::F32, weights: DType::F32, tolerance: 1e-4 },
    Precision { activations: DType::F32, weights: DType::F16, tolerance: 1e-4 },
    Precision { activations: DType::BF16, weights: DType::BF16, tolerance: 3e-2 },
];

/// One file of goldens: inputs, outputs and, for tiny networks, weights.
struct Golden {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let path = root().join(format!("tests/goldens/networks_{name}.safetensors"));
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        Self { path, tensors }
    }

    fn get(&self, name: &str) -> Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{} has no {name}", self.path.display())).clone()
    }

    /// From NCHW.
    fn map(&self, name: &str, dtype: DType) -> Tensor {
        channels_last(&self.get(name)).to_dtype(dtype).unwrap()
    }

    fn weights(&self, dtype: DType) -> Loader<'static> {
        weights(&self.path, dtype).pp("weights")
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn weights(path: &Path, dtype: DType) -> Loader<'static> {
    VarBuilder::from_buffered_safetensors(std::fs::read(path).unwrap(), dtype, &Device::Cpu).unwrap().into()
}

fn channels_last(x: &Tensor) -> Tensor {
    x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

fn config(name: &str) -> Value {
    let all: Value =
        serde_json::from_slice(&std::fs::read(root().join("tests/goldens/networks.json")).unwrap()).unwrap();
    all.get(name).unwrap().clone()
}

fn demo(part: &str, file: &str) -> PathBuf {
    root().join("assets/demo").join(part).join(file)
}

fn demo_config(part: &str) -> Value {
    serde_json::from_slice(&std::fs::read(demo(part, "config.json")).unwrap()).unwrap()
}

fn parse<T: serde::de::DeserializeOwned>(config: &Value) -> T {
    serde_json::from_value(config.clone()).unwrap()
}

/// max |Δ| / max |reference|; infinite if a value is NaN.
fn relative_error(ours: &Tensor, reference: &Tensor) -> f64 {
    let values = |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (ours, reference) = (values(ours), values(reference));
    let largest = reference.iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
    let error = ours.iter().zip(&reference).map(|(a, b)| f64::from((a - b).abs()));
    error.fold(0.0, |m: f64, e| if e.is_nan() { f64::INFINITY } else { m.max(e) }) / largest
}

#[track_caller]
fn check_close(what: &str, precision: Precision, ours: &Tensor, reference: &Tensor) {
    assert_eq!(ours.dims(), reference.dims(), "{what}");
    let error = relative_error(ours, reference);
    let Precision { activations, weights, tolerance } = precision;
    println!("{what:34} {activations:?}, weights {weights:?}: relative error {error:.1e}, allowed {tolerance:.0e}");
    assert!(error <= tolerance, "{what}: relative error {error:e}, allowed {tolerance:e}");
}

fn go() -> Result<()> {
    Ok(())
}

fn run_unet(unet: &Unet, golden: &Golden, dtype: DType, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
    evaluate(unet, golden, Text::Embedded(&golden.get("in.context")), dtype, check)
}

fn evaluate(unet: &Unet, golden: &Golden, text: Text, dtype: DType, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
    let pooled = golden.get("in.pooled");
    let timesteps: Vec<f64> = numbers(&golden.get("in.timesteps").unsqueeze(0).unwrap()).remove(0);
    let time_ids = numbers(&golden.get("in.time_ids"));
    let down: Vec<Tensor> =
        (0..).map_while(|i| golden.tensors.get(&format!("in.down.{i}"))).map(channels_last).collect();
    let mid = golden.tensors.get("in.mid").map(channels_last);
    unet.forward(UnetInput {
        sample: &golden.map("in.sample", dtype),
        timesteps: &timesteps,
        text,
        pooled: &pooled,
        time_ids: &time_ids,
        down_residuals: mid.as_ref().map(|_| down.as_slice()),
        mid_residual: mid.as_ref(),
        pictures: &[],
        features: &[],
        steering: Steering::default(),
        check,
    })
}

fn numbers(x: &Tensor) -> Vec<Vec<f64>> {
    x.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

fn check_vae(what: &str, loader: &Loader, config: &VaeConfig, golden: &Golden, precision: Precision) {
    let dtype = precision.activations;
    let encoder = VaeEncoder::load(loader, config).unwrap();
    for extent in [Extent::Whole, Extent::Strips] {
        let moments = encoder.encode(&golden.map("in.picture", dtype), extent, &go).unwrap();
        let (mean, logvar) = (golden.map("out.mean", DType::F32), golden.map("out.logvar", DType::F32));
        check_close(&format!("{what} mean, {extent:?}"), precision, &moments.mean, &mean);
        check_close(&format!("{what} logvar, {extent:?}"), precision, &moments.logvar, &logvar);
    }
    let decoder = VaeDecoder::load(loader, config).unwrap();
    for extent in [Extent::Whole, Extent::Strips] {
        let picture = decoder.decode(&golden.map("in.latents", dtype), extent, &go).unwrap();
        assert_eq!(picture.dtype(), dtype);
        let what = format!("{what} picture, {extent:?}");
        check_close(&what, precision, &picture, &golden.map("out.picture", DType::F32));
    }
}

#[test]
fn tiled_decode_gives_the_same_image() {
    let loader = weights(&demo("vae", "diffusion_pytorch_model.safetensors"), DType::F32);
    let decoder = VaeDecoder::load(&loader, &parse(&demo_config("vae"))).unwrap();
    // Two, so that samples are not mixed; several strips at the upper levels, the last of them short, and an odd width.
    let latents: Vec<f32> = (0..2 * 41 * 13 * 4).map(|i| (f64::from(i) * 0.7).sin() as f32 * 3.0).collect();
    let latents = Tensor::from_vec(latents, (2, 41, 13, 4), &Device::Cpu).unwrap();
    let whole = decoder.decode(&latents, Extent::Whole, &go).unwrap();
    let strips = decoder.decode(&latents, Extent::Strips, &go).unwrap();
    assert_eq!((strips.dims(), strips.dtype()), (whole.dims(), whole.dtype()));
    let precision = Precision { tolerance: 1e-5, ..PRECISIONS[0] };
    check_close("strips", precision, &strips, &whole);
    let polls = Cell::new(0);
    let stop = || match polls.replace(polls.get() + 1) {
        40.. => Err(Error::Cancelled),
        _ => Ok(()),
    };
    assert_eq!(decoder.decode(&latents, Extent::Strips, &stop).unwrap_err().code(), "cancelled");
    assert_eq!(polls.get(), 41);
}

#[test]
fn tiled_encode_gives_the_same_latents() {
    let loader = weights(&demo("vae", "diffusion_pytorch_model.safetensors"), DType::F32);
    let encoder = VaeEncoder::load(&loader, &parse(&demo_config("vae"))).unwrap();
    // Two, so that samples are not mixed; several strips, the last of them short, and an odd width.
    let picture: Vec<f32> = (0..2 * 328 * 109 * 3).map(|i| (f64::from(i) * 0.7).sin() as f32).collect();
    let picture = Tensor::from_vec(picture, (2, 328, 109, 3), &Device::Cpu).unwrap();
    let whole = encoder.encode(&picture, Extent::Whole, &go).unwrap();
    let strips = encoder.encode(&picture, Extent::Strips, &go).unwrap();
    let precision = Precision { tolerance: 1e-5, ..PRECISIONS[0] };
    check_close("mean in strips", precision, &strips.mean, &whole.mean);
    check_close("logvar in strips", precision, &strips.logvar, &whole.logvar);
    let polls = Cell::new(0);
    let stop = || match polls.replace(polls.get() + 1) {
        20.. => Err(Error::Cancelled),
        _ => Ok(()),
    };
    assert_eq!(encoder.encode(&picture, Extent::Strips, &stop).unwrap_err().code(), "cancelled");
}

fn check_clip(what: &str, loader: &Loader, config: &ClipConfig, golden: &Golden, precision: Precision) {
    let ids = golden.get("in.ids").to_dtype(DType::U32).unwrap();
    let pooled = golden.tensors.get("out.pooled");
    let model = ClipTextModel::load(loader, config, pooled.is_some(), precision.activations).unwrap();
    for skip in [0, 1] {
        let output = model.forward(&ids, skip).unwrap();
        let reference = golden.get(&format!("out.skip_{skip}"));
        check_close(&format!("{what} hidden, skip {skip}"), precision, &output.hidden, &reference);
        assert_eq!(output.pooled.is_some(), pooled.is_some());
        if let (Some(ours), Some(reference)) = (&output.pooled, pooled) {
            check_close(&format!("{what} pooled, skip {skip}"), precision, ours, reference);
        }
    }
}

#[test]
fn unets_of_every_layout_equal_diffusers() {
    for name in UNETS {
        let golden = Golden::open(name);
        for precision in PRECISIONS {
            let unet = Unet::load(&golden.weights(precision.weights), &parse(&config(name))).unwrap();
            let ours = run_unet(&unet, &golden, precision.activations, &go).unwrap();
            assert_eq!(ours.dtype(), precision.activations);
            check_close(name, precision, &ours, &golden.map("out.sample", DType::F32));
        }
    }
}

#[test]
fn cached_cross_attention_keys_give_the_same_bits() {
    let bits = |x: &Tensor| -> Vec<f32> { x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap() };
    for name in UNETS {
        let golden = Golden::open(name);
        for Precision { activations, weights, .. } in PRECISIONS {
            let unet = Unet::load(&golden.weights(weights), &parse(&config(name))).unwrap();
            let wanted = bits(&run_unet(&unet, &golden, activations, &go).unwrap());
            let text = unet.read(&golden.get("in.context"), activations, &go).unwrap();
            for step in 0..2 {
                let ours = evaluate(&unet, &golden, Text::Read(&text), activations, &go).unwrap();
                assert_eq!(bits(&ours), wanted, "{name}, {activations:?}, step {step}");
            }
        }
    }
}

#[test]
fn cached_cross_attention_keys_of_another_shape_are_a_bug() {
    let golden = Golden::open("refiner");
    let unet = Unet::load(&golden.weights(DType::F32), &parse(&config("refiner"))).unwrap();
    let context = golden.get("in.context");
    let one = context.narrow(0, 0, 1).unwrap();
    for (context, dtype) in [(&context, DType::BF16), (&Tensor::cat(&[&context, &one], 0).unwrap(), DType::F32)] {
        let text = unet.read(context, dtype, &go).unwrap();
        let answer = evaluate(&unet, &golden, Text::Read(&text), DType::F32, &go);
        assert_eq!(answer.err().unwrap().code(), "internal");
    }
}

#[test]
fn vaes_of_every_layout_equal_diffusers() {
    for name in VAES {
        let golden = Golden::open(name);
        for precision in PRECISIONS {
            check_vae(name, &golden.weights(precision.weights), &parse(&config(name)), &golden, precision);
        }
    }
}

#[test]
fn text_encoders_of_every_layout_equal_transformers() {
    for name in ["clip", "clip_legacy_eos"] {
        let golden = Golden::open(name);
        for precision in PRECISIONS {
            check_clip(name, &golden.weights(precision.weights), &parse(&config(name)), &golden, precision);
        }
    }
}

#[test]
fn networks_of_the_demonstration_model_equal_diffusers() {
    const MODEL: &str = "diffusion_pytorch_model.safetensors";
    for precision in PRECISIONS {
        for part in ["text_encoder", "text_encoder_2"] {
            let golden = Golden::open(&format!("demo_{part}"));
            let loader = weights(&demo(part, "model.safetensors"), precision.weights);
            check_clip(part, &loader, &parse(&demo_config(part)), &golden, precision);
        }
        let golden = Golden::open("demo_vae");
        check_vae(
            "vae",
            &weights(&demo("vae", MODEL), precision.weights),
            &parse(&demo_config("vae")),
            &golden,
            precision,
        );
        let golden = Golden::open("demo_unet");
        let unet = Unet::load(&weights(&demo("unet", MODEL), precision.weights), &parse(&demo_config("unet"))).unwrap();
        let ours = run_unet(&unet, &golden, precision.activations, &go).unwrap();
        check_close("unet", precision, &ours, &golden.map("out.sample", DType::F32));
    }
}

#[test]
fn attention_weights_of_old_vaes_are_read() {
    let golden = Golden::open("vae");
    let renamed = golden.tensors.iter().filter(|(name, _)| name.starts_with("weights.")).map(|(name, value)| {
        let mut name = name.clone();
        let mut value = value.to_dtype(DType::F32).unwrap();
        for (now, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
            if name.contains(now) {
                name = name.replace(now, old);
                if value.rank() == 2 {
                    value = value.unsqueeze(2).unwrap().unsqueeze(3).unwrap(); // as a 1×1 convolution's
                }
            }
        }
        (name, value)
    });
    let loader = Loader::from(VarBuilder::from_tensors(renamed.collect(), DType::F32, &Device::Cpu)).pp("weights");
    check_vae("old vae", &loader, &parse(&config("vae")), &golden, PRECISIONS[0]);
}

#[test]
fn latent_scaling_and_its_inverse_cancel() {
    for (name, z) in [("vae", [4, 2]), ("vae_no_quant", [6, 3])] {
        let mut config: VaeConfig = parse(&config(name));
        config.scaling_factor = 0.4;
        config.shift_factor = Some(0.3);
        let latents = Tensor::arange(0f32, (z[0] * z[1]) as f32, &Device::Cpu).unwrap();
        let latents = latents.reshape((1, z[1], 1, z[0])).unwrap();
        let scaled = config.to_model(&latents).unwrap();
        let first: f32 = scaled.flatten_all().unwrap().to_vec1::<f32>().unwrap()[1];
        let wanted = if name == "vae" { (1.0 - 0.3) * 0.4 } else { (1.0 + 0.2) * 0.4 / 0.9 };
        assert!((first - wanted).abs() < 1e-6, "{name}: {first}, wanted {wanted}");
        check_close(name, PRECISIONS[0], &config.from_model(&scaled).unwrap(), &latents);
    }
}

#[test]
fn cancellation_takes_effect_within_one_unet_evaluation() {
    let golden = Golden::open("refiner");
    let unet = Unet::load(&golden.weights(DType::F32), &parse(&config("refiner"))).unwrap();
    let calls = Cell::new(0);
    run_unet(&unet, &golden, DType::F32, &|| {
        calls.set(calls.get() + 1);
        Ok(())
    })
    .unwrap();
    // 15 layers and the middle block, 12 transformer blocks, the first and last layers; and cross-attention keys of those 12.
    let whole = calls.get();
    assert_eq!(whole, 42);
    for stop in [1, 7, 20, whole] {
        calls.set(0);
        let answer = run_unet(&unet, &golden, DType::F32, &|| {
            calls.set(calls.get() + 1);
            if calls.get() == stop { Err(Error::Cancelled) } else { Ok(()) }
        });
        assert!(matches!(answer, Err(Error::Cancelled)), "stopped at {stop}: {answer:?}");
        assert_eq!(calls.get(), stop);
    }
}

#[test]
fn components_of_other_models_are_refused() {
    let golden = Golden::open("refiner");
    let unet = Unet::load(&golden.weights(DType::F32), &parse(&config("refiner"))).unwrap();
    let base = Golden::open("no_mid_block");
    let answer = run_unet(&unet, &base, DType::F32, &go);
    assert!(
        matches!(&answer, Err(Error::ModelUnsupported { message, .. }) if message.contains("6 time ids")),
        "{answer:?}"
    );
    let answer = run_unet(&unet, &Golden::open("inpaint_odd_size"), DType::F32, &go);
    assert!(matches!(&answer, Err(Error::ModelUnsupported { message, .. }) if message.contains("got 9")), "{answer:?}");
    let parsed: UnetConfig = parse(&config("refiner"));
    assert_eq!((parsed.time_ids(10), parsed.time_ids(9), parsed.time_ids(50)), (Some(5), None, None));
}

#[test]
fn weights_of_other_networks_are_refused() {
    let vae = Golden::open("vae").weights(DType::F32);
    let check = |error: Option<Error>| {
        let error = error.unwrap();
        assert_eq!(error.code(), "model_unsupported", "{error}");
    };
    check(Unet::load(&vae, &parse(&config("refiner"))).err());
    check(VaeDecoder::load(&vae, &parse(&config("vae_no_quant"))).err());
    check(VaeEncoder::load(&vae.pp("nowhere"), &parse(&config("vae"))).err());
    check(ClipTextModel::load(&vae, &parse(&config("clip")), true, DType::F32).err());
}

#[test]
fn ids_and_clip_skip_beyond_the_model_are_errors() {
    let golden = Golden::open("clip");
    let model = ClipTextModel::load(&golden.weights(DType::F32), &parse(&config("clip")), true, DType::F32).unwrap();
    let run = |ids: Vec<u32>, skip: usize| {
        let length = ids.len();
        model.forward(&Tensor::from_vec(ids, (1, length), &Device::Cpu).unwrap(), skip)
    };
    assert!(run(vec![62, 63], 3).is_ok());
    assert_eq!(run(vec![62, 63], 4).err().unwrap().code(), "invalid_parameter");
    assert_eq!(run(vec![62, 63], usize::MAX).err().unwrap().code(), "invalid_parameter");
    assert_eq!(run(vec![62, 64], 0).err().unwrap().code(), "model_unsupported");
    assert_eq!(run(vec![62; 12], 0).err().unwrap().code(), "internal");
    assert_eq!(run(vec![], 0).err().unwrap().code(), "internal");
}

#[test]
fn odd_width_sinusoids_end_with_zero() {
    let sinusoid = Sinusoid { width: 5, flip_sin_to_cos: true, freq_shift: 0.0 };
    let row: Vec<Vec<f32>> = sinusoid.embed([[2.0].as_slice()], &Device::Cpu).unwrap().to_vec2().unwrap();
    let wanted = [2f32.cos(), 0.02f32.cos(), 2f32.sin(), 0.02f32.sin(), 0.0];
    let near = row[0].iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(near && row[0].len() == 5, "{row:?}, wanted {wanted:?}");
}
