//! Facts inferred from single files and components: configurations from shapes, the prediction type, and precedence.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use sdxl_worker::error::Result;
use sdxl_worker::inference::interface::{GenerateRequest, RefinerOptions};
use sdxl_worker::model::checkpoint::{Checkpoint, Part};
use sdxl_worker::model::instructor::ModelResources;
use sdxl_worker::model::interface::{HubSettings, Settings};
use sdxl_worker::model::networks::PerBlock;
use sdxl_worker::runtime::config::Config;
use sdxl_worker::scheduler::config::Prediction;

use super::conditioning::demo_folder;
use super::drawing::Worker;
use super::single::{KOALA_1B, KOALA_700M, REFINER, SSD_1B, VEGA, whole};
use super::single_layouts::{BASE, Build, Layout, sparse};

fn resources(root: &Path) -> ModelResources {
    let hub = HubSettings { cache: Some("no-hub".into()), ..HubSettings::default() };
    ModelResources::new(&Settings { roots: vec![root.to_owned()], hub, ..Settings::default() })
}

fn resolved(root: &Path, name: &str, parts: &[(Part, Option<&str>)]) -> Result<Arc<Checkpoint>> {
    resources(root).catalog.resolve_with(Some(name), parts)
}

/// The values of a published model's `unet/config.json`.
struct Published {
    build: Build,
    heads: &'static [usize],
    /// From the highest resolution, 0 for a level without.
    down: &'static [&'static [usize]],
    /// From the lowest resolution.
    up: &'static [&'static [usize]],
    mid: Option<&'static str>,
    layers: usize,
    added: usize,
}

#[test]
fn shapes_give_the_published_configurations() {
    let cross = Some("UNetMidBlock2DCrossAttn");
    let plain = Some("UNetMidBlock2D");
    let wide: &[usize] = &[5, 10, 20];
    let sdxl = |build, down, up, mid, layers| Published { build, heads: wide, down, up, mid, layers, added: 2816 };
    let all = [
        sdxl(BASE, &[&[0, 0], &[2, 2], &[10, 10]], &[&[10, 10, 10], &[2, 2, 2], &[0, 0, 0]], cross, 2),
        sdxl(SSD_1B, &[&[0, 0], &[2, 2], &[4, 4]], &[&[4, 4, 10], &[2, 1, 1], &[0, 0, 0]], plain, 2),
        sdxl(VEGA, &[&[0, 0], &[1, 1], &[2, 2]], &[&[2, 2, 2], &[1, 1, 1], &[0, 0, 0]], plain, 2),
        sdxl(KOALA_700M, &[&[0], &[2], &[5]], &[&[5, 5], &[2, 2], &[0, 0]], None, 1),
        sdxl(KOALA_1B, &[&[0], &[2], &[6]], &[&[6, 6], &[2, 2], &[0, 0]], cross, 1),
        Published {
            build: REFINER,
            heads: &[6, 12, 24, 24],
            down: &[&[0, 0], &[4, 4], &[4, 4], &[4]],
            up: &[&[0, 0, 0], &[4, 4, 4], &[4, 4, 4], &[0, 0, 0]],
            mid: cross,
            layers: 2,
            added: 2560,
        },
    ];
    for published in all {
        let root = tempfile::tempdir().unwrap();
        sparse(&whole(&published.build), "F16", &[], &root.path().join("m.safetensors"));
        let model = resolved(root.path(), "m", &[]).unwrap();
        let unet = &model.unet;
        let family = model.family.name;
        assert_eq!(unet.block_out_channels, published.build.channels, "{family}");
        assert_eq!(unet.mid_block_type.as_deref(), published.mid, "{family}");
        let blocks = published.heads.len();
        for i in 0..blocks {
            assert_eq!(unet.layers_per_block.at(i), Some(&published.layers), "{family}");
            let depths = unet.transformer_layers_per_block.at(i).unwrap();
            assert_eq!(depths.values(), published.down[i], "{family}, level {i}");
            // Heads matter where there are transformers.
            if published.down[i].iter().any(|depth| *depth > 0) {
                assert_eq!(unet.attention_head_dim.at(i), Some(&published.heads[i]), "{family}, level {i}");
            }
        }
        let up = unet.reverse_transformer_layers_per_block.as_ref().unwrap();
        assert_eq!(up.iter().map(PerBlock::values).collect::<Vec<_>>(), published.up, "{family}");
        let numbers = (unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim, unet.out_channels);
        assert_eq!(numbers, (Some(256), Some(published.added), 4), "{family}");
        assert_eq!(unet.cross_attention_dim.values(), [published.build.context], "{family}");
        assert!(unet.flip_sin_to_cos && unet.freq_shift == 0.0 && unet.act_fn == "silu");
        assert_eq!(
            (unet.norm_eps, unet.norm_num_groups, unet.time_embedding_dim),
            (1e-5, Some(32), Some(4 * published.build.channels[0]))
        );

        let second = &model.text_encoder_2;
        assert_eq!((second.hidden_act.as_str(), second.projection_dim), ("gelu", Some(1280)));
        assert_eq!((second.hidden_size, second.num_attention_heads, second.num_hidden_layers), (1280, 20, 32));
        assert_eq!((second.intermediate_size, second.max_position_embeddings, second.vocab_size), (5120, 77, 49408));
        if let Some(first) = &model.text_encoder {
            assert_eq!((first.hidden_act.as_str(), first.hidden_size), ("quick_gelu", 768));
            assert_eq!((first.num_attention_heads, first.num_hidden_layers, first.intermediate_size), (12, 12, 3072));
        }
        let vae = &model.vae;
        assert_eq!(vae.block_out_channels, [128, 256, 512, 512]);
        assert_eq!((vae.layers_per_block, vae.latent_channels, vae.scaling_factor), (2, 4, 0.13025));
        assert!(vae.use_quant_conv && vae.use_post_quant_conv && vae.mid_block_add_attention);
    }
}

#[test]
fn unet_file_brings_its_prediction_type() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    sparse(&whole(&BASE), "F16", &[], &path("base.safetensors"));
    let mut marked = BASE.single();
    for name in ["edm_mean", "edm_std"] {
        marked.insert(name.to_owned(), vec![1, 4, 1, 1]);
    }
    sparse(&marked, "F16", &[], &path("playground.safetensors"));
    // Both sort first, and all their values are ones.
    let header = fs::File::open(path("playground.safetensors")).map(|mut file| {
        let mut length = [0; 8];
        std::io::Read::read_exact(&mut file, &mut length).unwrap();
        u64::from_le_bytes(length)
    });
    let mut file = fs::OpenOptions::new().write(true).open(path("playground.safetensors")).unwrap();
    file.seek(SeekFrom::Start(8 + header.unwrap())).unwrap();
    file.write_all(&[0x00, 0x3c].repeat(8)).unwrap();
    let model = resolved(root.path(), "base", &[(Part::Unet, Some("playground"))]).unwrap();
    assert_eq!((model.variant, model.vae.scaling_factor), (Some("playground_v2_5"), 0.5));
    let ones = Some(vec![1.0; 4]);
    assert_eq!((&model.vae.latents_mean, &model.vae.latents_std), (&ones, &ones));
    assert!(model.scheduler.is_edm());
    let plain = resolved(root.path(), "base", &[]).unwrap();
    assert_eq!((plain.vae.scaling_factor, &plain.vae.latents_std), (0.13025, &None));
    assert_ne!(plain.key, model.key);

    // So do a whole model's folder and its UNet's own folder.
    demo_folder(&path("plain"));
    demo_folder(&path("other"));
    let edit = |file: &str, key: &str, value: serde_json::Value| {
        let path = path(file);
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::remove_file(&path).unwrap();
        fs::write(&path, config.to_string()).unwrap();
    };
    edit("other/scheduler/scheduler_config.json", "prediction_type", "v_prediction".into());
    edit("other/vae/config.json", "scaling_factor", 0.25.into());
    for name in ["other", "other/unet"] {
        let model = resolved(root.path(), "plain", &[(Part::Unet, Some(name))]).unwrap();
        assert_eq!(model.scheduler.prediction_type, Prediction::VPrediction, "{name}");
        assert_eq!((model.variant, model.vae.scaling_factor), (Some("v_prediction"), 0.25), "{name}");
        // A separately named autoencoder has its own scale.
        let both = [(Part::Vae, Some("plain/vae")), (Part::Unet, Some(name))];
        let model = resolved(root.path(), "plain", &both).unwrap();
        assert_ne!(model.vae.scaling_factor, 0.25);
    }
}

#[test]
fn refiner_continues_from_the_same_latents() {
    let root = tempfile::tempdir().unwrap();
    for (name, file, key, value) in [
        ("scaled", "vae/config.json", "scaling_factor", serde_json::json!(0.5)),
        ("moved", "vae/config.json", "latents_mean", serde_json::json!([0.0, 1.0, 2.0, 3.0])),
        ("whole", "scheduler/scheduler_config.json", "prediction_type", serde_json::json!("sample")),
    ] {
        demo_folder(&root.path().join(name));
        let path = root.path().join(name).join(file);
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        if name == "moved" {
            config["latents_std"] = serde_json::json!([1.0, 1.0, 1.0, 1.0]);
        }
        if name == "whole" {
            config["_class_name"] = "EDMEulerScheduler".into();
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, config.to_string()).unwrap();
    }
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![root.path().to_owned()];
    let mut worker = Worker::with(&config);
    let mut refused = |model: &str, refiner: Option<&str>| {
        let request = GenerateRequest {
            prompt: Some("a hill".to_owned()),
            model: Some(model.to_owned()),
            refiner: refiner.map(|model| RefinerOptions { model: model.to_owned(), switch_at: None }),
            ..GenerateRequest::default()
        };
        let Err(error) = worker.instructors.inference.plan(&request, &mut worker.managers) else {
            return String::new();
        };
        format!("{} {error}", error.code())
    };
    assert_eq!(refused("demo", Some("demo")), "");
    for refiner in ["scaled", "moved"] {
        let error = refused("demo", Some(refiner));
        assert!(error.starts_with("invalid_parameter") && error.contains("latents differ"), "{error}");
    }
    // EDM models have no `sample` prediction.
    let error = refused("whole", None);
    assert!(error.starts_with("model_unsupported") && error.contains("got `sample`"), "{error}");
}

#[test]
fn leftover_tensors_do_not_identify_a_file() {
    let root = tempfile::tempdir().unwrap();
    let mut layout = whole(&BASE);
    layout.insert("cond_stage_model.transformer.text_model.embeddings.position_ids".to_owned(), vec![1, 77]);
    layout.insert("cond_stage_model.model.logit_scale".to_owned(), vec![]);
    sparse(&layout, "F16", &[], &root.path().join("m.safetensors"));
    assert_eq!(resolved(root.path(), "m", &[]).unwrap().family.name, "sdxl_base");

    layout.extend((0..20_001).map(|i| (format!("more.{i}"), vec![0])));
    sparse(&layout, "F16", &[], &root.path().join("m.safetensors"));
    let error = resolved(root.path(), "m", &[]).unwrap_err();
    assert_eq!(error.code(), "model_unsupported");
    assert!(error.to_string().contains("tensors, and a model has at most 20000"), "{error}");
}

#[test]
fn folder_does_not_hide_a_file_of_its_name() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    let write = |name: &str, rows: usize| {
        let layout = Layout::from([("lora_unet_mid_block.lora_down.weight".to_owned(), vec![rows, 4])]);
        sparse(&layout, "F16", &[], &path(name));
        fs::metadata(path(name)).unwrap().len()
    };
    demo_folder(&path("anime"));
    fs::create_dir_all(path("loras")).unwrap();
    let resources = resources(root.path());
    let bytes = |name: &str| resources.catalog.lora(name, "loras").map(|found| found.file_bytes().0);
    assert_eq!(bytes("anime").unwrap_err().code(), "model_not_found");
    let below = write("loras/anime.safetensors", 4);
    assert_eq!(bytes("anime").unwrap(), below);
    let own = write("anime.safetensors", 8);
    assert_eq!(bytes("anime").unwrap(), own);
    // A folder with one weight file stands for it, unless a file has the name.
    fs::create_dir_all(path("style")).unwrap();
    let only = write("style/by-someone.safetensors", 16);
    assert_eq!(bytes("style").unwrap(), only);
    let own = write("style.safetensors", 2);
    assert_eq!(bytes("style").unwrap(), own);
}

#[test]
fn latents_with_mean_and_std_are_scaled_as_in_diffusers() {
    let mut vae = Checkpoint::demo().unwrap().vae;
    vae.scaling_factor = 0.5;
    // The values of Playground v2.5.
    vae.latents_mean = Some(vec![-1.6574, 1.886, -1.383, 2.5155]);
    vae.latents_std = Some(vec![8.4927, 5.9022, 6.5498, 5.2299]);
    let latents = [0.25_f32, -1.0, 2.0, 0.5];
    let z = Tensor::new(&latents, &Device::Cpu).unwrap().reshape((1, 1, 1, 4)).unwrap();
    let scaled = vae.from_model(&z).unwrap();
    let got = scaled.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // `latents * latents_std / scaling_factor + latents_mean`
    for (got, wanted) in got.iter().zip([2.588_95_f32, -9.9184, 24.8162, 7.7454]) {
        assert!((got - wanted).abs() < 1e-5, "{got}, and {wanted} is wanted");
    }
    let back = vae.to_model(&scaled).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (back, own) in back.iter().zip(latents) {
        assert!((back - own).abs() < 1e-6, "{back}, and {own} is wanted");
    }
}
