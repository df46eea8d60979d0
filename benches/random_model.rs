//! Writes SDXL base at full size with random weights: `cargo bench --bench random_model -- DIR`.
//!
//! For measuring memory and time without the real weights. Names and shapes are those that the networks load, so the files
//! always fit; the configurations are those of SDXL base 1.0.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use sdxl_worker::kernels::{LoadPolicy, Loader, StoredWeight, WeightSource};
use sdxl_worker::model::networks::clip::ClipTextModel;
use sdxl_worker::model::networks::unet::Unet;
use sdxl_worker::model::networks::vae::{VaeDecoder, VaeEncoder};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Normal numbers shared by all weights; each tensor starts at another offset.
const POOL: usize = 1 << 20;

fn main() -> Result<(), Failure> {
    let Some(folder) = std::env::args().skip(1).find(|argument| !argument.starts_with('-')) else {
        eprintln!("random_model writes 6.5 GB; name a folder: cargo bench --bench random_model -- DIR");
        return Ok(());
    };
    let folder = Path::new(&folder);
    write_json(folder, "model_index.json", &index())?;
    write_json(folder, "scheduler/scheduler_config.json", &scheduler())?;
    let pool = pool();
    let text = |with_projection| {
        move |loader: &Loader, config: &Value| -> Result<(), Failure> {
            let config = serde_json::from_value(config.clone())?;
            ClipTextModel::load(loader, &config, with_projection, DType::BF16)?;
            Ok(())
        }
    };
    component(folder, "text_encoder/model", clip_l(), &pool, text(false))?;
    component(folder, "text_encoder_2/model", clip_g(), &pool, text(true))?;
    component(folder, "vae/diffusion_pytorch_model", vae(), &pool, |loader, config| {
        let config = serde_json::from_value(config.clone())?;
        VaeEncoder::load(loader, &config)?;
        VaeDecoder::load(loader, &config)?;
        Ok(())
    })?;
    component(folder, "unet/diffusion_pytorch_model", unet(), &pool, |loader, config| {
        Unet::load(loader, &serde_json::from_value(config.clone())?)?;
        Ok(())
    })
}

/// Writes one network's configuration and weights.
fn component(
    folder: &Path,
    stem: &str,
    config: Value,
    pool: &[f32],
    load: impl FnOnce(&Loader, &Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let requested = Arc::new(Mutex::new(BTreeMap::new()));
    load(&Loader::new(Recorder(Arc::clone(&requested)), LoadPolicy::default()), &config)?;
    let part = Path::new(stem).parent().unwrap_or(Path::new(""));
    write_json(folder, &part.join("config.json").to_string_lossy(), &config)?;
    let shapes = requested.lock().map_err(|_| "a load failed")?;
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, shape) in shapes.iter() {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 22, File::create(folder.join(format!("{stem}.safetensors")))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (number, (name, shape)) in shapes.iter().enumerate() {
        write_tensor(&mut file, name, shape, number, pool)?;
    }
    file.flush()?;
    eprintln!("{stem}: {} tensors, {} parameters", shapes.len(), offset / 2);
    Ok(())
}

/// Norms are 1, biases 0, and weights normal with the variance 1 / fan-in, so that activations keep their size.
fn write_tensor(
    file: &mut impl Write,
    name: &str,
    shape: &[usize],
    number: usize,
    pool: &[f32],
) -> std::io::Result<()> {
    let count: usize = shape.iter().product();
    let bytes = |value: f32| bf16::from_f32(value).to_le_bytes();
    if shape.len() == 1 {
        return file.write_all(&bytes(if name.ends_with("weight") { 1.0 } else { 0.0 }).repeat(count));
    }
    let scale = (shape.iter().skip(1).product::<usize>() as f32).powf(-0.5);
    let start = (number * 7919 + 13) % pool.len();
    let order = pool.iter().cycle().skip(start).take(pool.len().min(count));
    let block: Vec<u8> = order.flat_map(|value| bytes(value * scale)).collect();
    let mut left = 2 * count;
    while left > 0 {
        let piece = &block[..block.len().min(left)];
        file.write_all(piece)?;
        left -= piece.len();
    }
    Ok(())
}

/// Standard normal numbers: splitmix64 (Steele et al. 2014) and Box-Muller.
fn pool() -> Vec<f32> {
    let mut state = 0u64;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let normal = |_| ((-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    (0..POOL).map(normal).collect()
}

/// Gives zeros for every tensor and records the requested names and shapes.
struct Recorder(Arc<Mutex<BTreeMap<String, Vec<usize>>>>);

impl WeightSource for Recorder {
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> candle_core::Result<StoredWeight> {
        let Some(shape) = shape else { candle_core::bail!("`{name}` was requested without its shape") };
        let mut requested = self.0.lock().map_err(|_| candle_core::Error::Msg("poisoned".to_owned()))?;
        requested.insert(name.to_owned(), shape.to_vec());
        StoredWeight::of(Tensor::zeros(1, DType::BF16, &Device::Cpu)?.broadcast_as(shape)?)
    }

    fn contains(&self, _: &str) -> bool {
        true
    }

    fn compute(&self) -> DType {
        DType::BF16
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }
}

fn write_json(folder: &Path, name: &str, value: &Value) -> Result<(), Failure> {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap_or(folder))?;
    Ok(fs::write(path, serde_json::to_vec_pretty(value)?)?)
}

fn index() -> Value {
    json!({
        "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1", "force_zeros_for_empty_prompt": true,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]
    })
}

fn scheduler() -> Value {
    json!({
        "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "steps_offset": 1, "timestep_spacing": "leading"
    })
}

fn clip_l() -> Value {
    json!({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
        "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1
    })
}

fn clip_g() -> Value {
    json!({
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "vocab_size": 49408,
        "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
        "num_attention_heads": 20, "max_position_embeddings": 77, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1
    })
}

fn vae() -> Value {
    json!({
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "act_fn": "silu", "latent_channels": 4,
        "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": true
    })
}

fn unet() -> Value {
    json!({
        "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4,
        "flip_sin_to_cos": true, "freq_shift": 0,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "act_fn": "silu", "norm_num_groups": 32,
        "norm_eps": 1e-5, "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20], "use_linear_projection": true, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816
    })
}
