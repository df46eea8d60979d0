//! ControlNets: request options, the errors of unusable files, and caching.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use candle_core::Tensor;
use sdxl_worker::context::Context;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::inference::interface::{GenerateRequest, Generated, Request, Response};
use sdxl_worker::layers::Interface;
use sdxl_worker::model::checkpoint::Checkpoint;
use sdxl_worker::model::interface::ModelRequest;
use sdxl_worker::model::managers::Reach;
use sdxl_worker::model::networks::controlnet_config::{ControlNetConfig, ControlNetConfigTask, ControlNetFile};
use sdxl_worker::model::networks::unet::UnetConfig;
use sdxl_worker::runtime::config::Config;
use sdxl_worker::runtime::dispatch::{Call, Reply};

use super::drawing::Worker;
use super::random_networks::{self, Layout};
use super::wire::{Worker as Process, code, validator};

const EDGES: &str = "tests/steer/files/control_edges.png";

fn worker(more: &Path) -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![random_networks::folder().to_owned(), more.to_owned()];
    config.workers.instructors.postprocessing.roots = vec!["tests/steer/files".into()];
    Worker::with(&config)
}

fn request(controlnet: serde_json::Value) -> GenerateRequest {
    let data = json!({
        "prompt": "a lake", "seed": 3, "steps": 2, "width": 64, "height": 64, "dtype": "f32", "controlnet": controlnet,
        "output": { "return": "base64" },
    });
    serde_json::from_value(data).unwrap()
}

fn generate(worker: &mut Worker, request: Request, ctx: &Context) -> Result<Generated> {
    match worker.instructors.dispatch(Call::Inference(request), &mut worker.managers, ctx)? {
        Reply::Inference(Response::Generated(generated)) => Ok(generated),
        other => panic!("{other:?}"),
    }
}

fn refusal(worker: &mut Worker, controlnet: serde_json::Value) -> Error {
    let request = Request::Controlnet(Box::new(request(controlnet)));
    generate(worker, request, &Context::detached()).map(|made| made.images).expect_err("is refused")
}

#[test]
fn unusable_controlnet_options_name_their_field() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("old.pth"), b"\x80\x02").unwrap();
    let plain = Layout::open("control_small");
    let mut narrow = Layout::open("control_small");
    for (_, shape, ..) in &mut narrow.tensors {
        shape.iter_mut().for_each(|side| *side = if *side == 160 { 128 } else { *side });
    }
    narrow.config.as_mut().unwrap()["block_out_channels"] = json!([32, 96, 128]);
    narrow.write(folder.path(), "narrow");
    // The same network as one file; its sizes come from its tensors.
    narrow.config = None;
    narrow.write(folder.path(), "narrow_file");
    let mut foreign = plain;
    foreign.config = None;
    foreign.tensors.retain(|(name, ..)| !name.starts_with("controlnet_"));
    foreign.write(folder.path(), "foreign");
    let mut worker = worker(folder.path());
    let mut check = |options: serde_json::Value, code: &str, field: &str, text: &str| {
        let error = refusal(&mut worker, options.clone());
        let place = if field.is_empty() { None } else { Some(format!("/data/{field}")) };
        assert_eq!((error.code(), error.pointer()), (code, place), "{options}: {error}");
        assert!(error.to_string().contains(text), "{options}: {error}");
    };
    let one = |more: serde_json::Value| {
        let mut options = json!({ "model": "control_small", "image": EDGES });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([options])
    };
    let invalid = "invalid_parameter";
    check(json!([]), invalid, "controlnet", "is missing");
    check(json!([{ "image": EDGES }]), invalid, "controlnet/0/model", "is missing");
    check(json!({ "model": "control_small" }), invalid, "controlnet/0/image", "is missing");
    check(json!(vec![json!({}); 9]), invalid, "controlnet", "at most 8");
    check(one(json!({ "weight": 2.5 })), invalid, "controlnet/0/weight", "0 to 2");
    check(one(json!({ "weight": -1 })), invalid, "controlnet/0/weight", "0 to 2");
    check(one(json!({ "start": 0.5, "end": 0.5 })), invalid, "controlnet/0/end", "above `start`");
    check(one(json!({ "guidance_end": 1.5 })), invalid, "controlnet/0/end", "0 to 1");
    check(one(json!({ "module": "cany" })), "unknown_name", "controlnet/0/preprocessor", "cany");
    check(one(json!({ "control_type": "cany" })), "unknown_name", "controlnet/0/control_type", "cany");
    check(one(json!({ "image": "../x.png" })), "path_not_allowed", "", "x.png");
    check(one(json!({ "image": "tests/steer/files/none.png" })), invalid, "controlnet/0/image", "none.png");
    check(one(json!({ "model": "nobody" })), "model_not_found", "", "nobody");
    check(one(json!({ "model": "../control" })), "path_not_allowed", "", "control");
    check(one(json!({ "model": "old.pth" })), "unsafe_format", "", "pickle");
    check(one(json!({ "model": "foreign" })), "model_unsupported", "", "`foreign` cannot be used: it is no ControlNet");
    for name in ["narrow", "narrow_file"] {
        let text = "it controls feature maps of 32, 32, 32, 96, 96, 128 channels, and the model's UNet has 32, 32, 32, 96, 96, 160";
        check(one(json!({ "model": name })), "model_unsupported", "", text);
    }
    let union = json!({ "model": "control_union" });
    check(one(union), invalid, "controlnet/0/control_type", "must be told what its image is");
    let second = json!([{ "model": "control_small", "image": EDGES }, { "model": "control_small", "image": EDGES, "weight": 9 }]);
    check(second, invalid, "controlnet/1/weight", "0 to 2");
}

/// The layout of the Hugging Face cache: links to files without an extension.
#[cfg(unix)]
#[test]
fn symlinks_within_the_roots_are_followed() {
    use std::os::unix::fs::symlink;
    let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (blobs, snapshot) = (root.path().join("blobs"), root.path().join("snapshot"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let own = random_networks::folder();
    fs::copy(own.join("control_single.safetensors"), blobs.join("0a1b")).unwrap();
    fs::copy(own.join("control_small/config.json"), blobs.join("2c3d")).unwrap();
    fs::copy(own.join("control_small/diffusion_pytorch_model.safetensors"), blobs.join("4e5f")).unwrap();
    fs::copy(own.join("control_single.safetensors"), outside.path().join("6a7b")).unwrap();
    symlink("blobs/0a1b", root.path().join("linked.safetensors")).unwrap();
    symlink("../blobs/2c3d", snapshot.join("config.json")).unwrap();
    symlink("../blobs/4e5f", snapshot.join("diffusion_pytorch_model.safetensors")).unwrap();
    symlink(outside.path().join("6a7b"), root.path().join("out.safetensors")).unwrap();
    let mut worker = worker(root.path());
    for (name, same) in
        [("linked", "control_single"), ("linked.safetensors", "control_single"), ("snapshot", "control_small")]
    {
        let mut draw = |name: &str| worker.draw(&request(json!({ "model": name, "image": EDGES }))).remove(0).1.data;
        assert!(draw(name) == draw(same), "{name}");
    }
    let error = refusal(&mut worker, json!({ "model": "out.safetensors", "image": EDGES }));
    assert_eq!(error.code(), "path_not_allowed", "{error}");
}

/// A Control-LoRA shares its model's weights, so it is unloaded with the model; other networks stay.
#[test]
fn control_lora_is_unloaded_with_its_model() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut worker = worker(nowhere.path());
    for model in ["control_lora", "control_small"] {
        worker.draw(&request(json!({ "model": model, "image": EDGES })));
    }
    let kept = |worker: &Worker| -> Vec<String> {
        let resident = worker.managers.resident().into_iter();
        resident.filter(|one| one.kind == "controlnet").map(|one| one.name).collect()
    };
    assert_eq!(kept(&worker), ["control_lora", "control_small"]);
    let options = ModelRequest { model: Some("demo".to_owned()), ..ModelRequest::default() };
    let unload = Call::Model(sdxl_worker::model::interface::Request::Unload(options));
    worker.instructors.dispatch(unload, &mut worker.managers, &Context::detached()).unwrap();
    assert_eq!(kept(&worker), ["control_small"]);
}

/// Tensor shapes by name.
type Sizes = HashMap<String, Vec<usize>>;

/// A single file's layers come from its tensors, which can hold more than a configuration can express.
#[test]
fn controlnet_layers_beyond_the_configuration_are_refused() {
    let demo = Checkpoint::demo().unwrap();
    let check = |change: &dyn Fn(&mut Sizes)| {
        let tensors = Layout::open("control").tensors.into_iter();
        let mut shapes: HashMap<_, _> = tensors.map(|(name, shape, ..)| (name, shape)).collect();
        change(&mut shapes);
        let shape = |name: &str| shapes.get(name).map(Vec::as_slice);
        let (unet, reduction) = (&demo.unet, demo.vae.reduction());
        ControlNetConfig::new(ControlNetConfigTask { name: "mine", file: None, shapes: &shape, unet, reduction })
            .map(drop)
    };
    let refused = |change: &dyn Fn(&mut Sizes), text: &str| {
        let error = check(change).unwrap_err();
        assert_eq!(error.code(), "model_unsupported");
        assert!(error.to_string().contains(text), "{error}");
    };
    check(&|_| {}).unwrap();
    let second = |shapes: &mut Sizes| {
        shapes.insert("down_blocks.1.resnets.1.conv1.weight".to_owned(), vec![96, 96, 3, 3]);
    };
    refused(&second, "the transformers of its `down_blocks.1` are of different depths");
    let middle = |shapes: &mut Sizes| {
        shapes.retain(|name, _| !name.starts_with("mid_block.attentions.0.transformer_blocks.1."));
    };
    refused(&middle, "its middle has 1 transformer blocks, and its last block 2");
    let quarter = |shapes: &mut Sizes| {
        shapes.retain(|name, _| !name.starts_with("controlnet_cond_embedding.blocks.5."));
    };
    refused(&quarter, "makes images 4 times smaller, and the model's latents are 8 times smaller");
    let wide = |shapes: &mut Sizes| {
        shapes.insert("controlnet_cond_embedding.conv_in.weight".to_owned(), vec![129, 3, 3, 3]);
    };
    refused(&wide, "must be between 1 and 128, got 129");
}

/// Low-rank factors that do not fit their layers; the products of two of them would be many times as large.
#[test]
fn control_lora_shapes_are_checked_before_multiplying() {
    let folder = tempfile::tempdir().unwrap();
    let wrong: [(&str, &[usize]); 5] = [
        ("in_layers.2.up", &[4096, 4, 1, 1]),
        ("in_layers.2.up", &[128]),
        ("in_layers.2.down", &[4, 4096, 3, 3]),
        ("in_layers.2.down", &[8, 32, 3, 3]),
        ("emb_layers.1.down", &[4]),
    ];
    for (i, (part, wrong)) in wrong.iter().enumerate() {
        let mut lora = Layout::open("control_lora");
        let name = format!("input_blocks.1.0.{part}");
        let (_, shape, ..) = lora.tensors.iter_mut().find(|(own, ..)| *own == name).unwrap();
        *shape = wrong.to_vec();
        lora.write(folder.path(), &format!("wrong_{i}"));
    }
    let mut worker = worker(folder.path());
    for (i, wrong) in wrong.iter().enumerate() {
        let error = refusal(&mut worker, json!({ "model": format!("wrong_{i}"), "image": EDGES }));
        assert_eq!(error.code(), "model_unsupported", "{wrong:?}: {error}");
    }
}

#[test]
fn controlnet_file_and_folder_give_the_same_bytes() {
    let more = tempfile::tempdir().unwrap();
    // Older files store linear weights as 1×1 convolutions.
    let mut convolved = Layout::open("control_single");
    for (name, shape, ..) in &mut convolved.tensors {
        if name.ends_with("proj_in.weight") || name.ends_with("proj_out.weight") {
            shape.extend([1, 1]);
        }
    }
    convolved.write(more.path(), "convolved");
    let mut worker = worker(more.path());
    let mut latents = |controlnet: serde_json::Value| -> Vec<f32> {
        let drawn = worker.draw(&request(controlnet));
        drawn.first().map(|(latents, _): &(Tensor, _)| latents.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
    };
    let folder = latents(json!({ "model": "control", "image": EDGES }));
    let file = latents(json!({ "model": "control_single", "image": EDGES }));
    let ended = latents(json!({ "model": "control_single.safetensors", "image": EDGES }));
    assert!(folder == file && folder == ended);
    assert!(folder == latents(json!({ "model": "convolved", "image": EDGES })));
    let weightless = latents(json!({ "model": "control", "image": EDGES, "weight": 0 }));
    let bare = latents(json!([]));
    assert!(weightless == bare && bare != folder);
}

#[test]
fn controlnet_echo_holds_the_defaults_and_hints_are_cached() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut worker = worker(nowhere.path());
    let ctx = Context::detached();
    let options = json!({ "model": "control_small", "input_image": EDGES, "control_type": "canny", "module": "canny" });
    let first = generate(&mut worker, Request::Controlnet(Box::new(request(options))), &ctx).unwrap();
    assert_eq!((first.cache.hints.hits, first.cache.hints.misses), (0, 1));
    assert!(ctx.warnings().iter().any(|text| text.contains("`controlnet.0.control_type` has no effect")));
    let echo = serde_json::to_value(&first.parameters.controlnet).unwrap();
    let wanted = json!([{
        "model": "control_small", "image": EDGES, "preprocessor": "canny", "weight": 1.0, "start": 0.0, "end": 1.0,
        "guess_mode": false, "control_type": "canny", "resize_mode": "stretch",
    }]);
    assert_eq!(echo, wanted);
    let kept: Vec<_> = worker.managers.resident().into_iter().filter(|one| one.kind == "controlnet").collect();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].name, "control_small");
    assert!(kept[0].bytes.0 > 3_000_000, "{}", kept[0].bytes);
    let again = Request::Generate(Box::new(GenerateRequest { seed: first.parameters.seed, ..*first.parameters }));
    let second = generate(&mut worker, again, &ctx).unwrap();
    assert_eq!((second.cache.hints.hits, second.cache.hints.misses), (1, 0));
    assert_eq!(second.images[0].base64, first.images[0].base64);
    worker.managers.free_memory(kept[0].bytes, Reach::Idle);
    worker.managers.free_memory(sdxl_worker::units::Bytes(u64::MAX), Reach::Idle);
    assert!(worker.managers.resident().is_empty(), "{:?}", worker.managers.resident());
}

#[test]
fn controlnet_applies_to_the_hires_pass() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut worker = worker(nowhere.path());
    let mut draw = |controlnet: serde_json::Value| {
        let larger = GenerateRequest { enable_hr: Some(true), hr_scale: Some(1.5), ..request(controlnet) };
        generate(&mut worker, Request::Generate(Box::new(larger)), &Context::detached()).unwrap()
    };
    let controlnet = json!({ "model": "control_small", "image": EDGES });
    let steered = draw(controlnet.clone());
    assert_eq!((steered.cache.hints.misses, steered.images[0].width), (2, 96), "one hint for each size");
    assert_eq!(draw(controlnet).images[0].base64, steered.images[0].base64);
    assert_ne!(draw(json!([])).images[0].base64, steered.images[0].base64);
}

#[test]
fn every_controlnet_kind_computes_in_every_dtype() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut worker = worker(nowhere.path());
    for (model, kind) in [("control_single", None), ("control_union", Some("depth")), ("control_lora", None)] {
        let mut draw = |more: serde_json::Value| -> Vec<u8> {
            let mut data =
                serde_json::to_value(request(json!({ "model": model, "image": EDGES, "control_type": kind }))).unwrap();
            data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            worker.draw(&serde_json::from_value(data).unwrap()).remove(0).1.data
        };
        let exact = draw(json!({}));
        for format in [json!({ "dtype": "bf16" }), json!({ "quantization": "int8" })] {
            let other = draw(format.clone());
            let apart =
                exact.iter().zip(&other).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / exact.len() as f64;
            println!("{model:<16} {format:<24} {apart:>6.2} of 255 a byte");
            assert!(apart > 0.0 && apart < 12.0, "{model} {format}: {apart}");
        }
    }
}

#[test]
fn estimate_counts_each_controlnet_once() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut worker = worker(nowhere.path());
    let mut weights = |controlnet: serde_json::Value| {
        let call = Call::Estimate(Box::new(request(controlnet)));
        match worker.instructors.dispatch(call, &mut worker.managers, &Context::detached()).unwrap() {
            Reply::Inference(Response::Estimate(estimate)) => estimate.weights.0,
            other => panic!("{other:?}"),
        }
    };
    let bare = weights(json!([]));
    let one = weights(json!({ "model": "control_small", "image": EDGES }));
    let twice =
        weights(json!([{ "model": "control_small", "image": EDGES }, { "model": "control_small", "image": EDGES }]));
    let file = random_networks::folder().join("control_small/diffusion_pytorch_model.safetensors");
    let header = fs::metadata(file).unwrap().len() - (one - bare);
    assert!((1..100_000).contains(&header), "{header}");
    assert_eq!(twice, one);
}

#[test]
fn unknown_key_in_a_controlnet_list_is_named() {
    assert!(sdxl_worker::inference::interface::Inference::OPERATIONS.contains(&"controlnet"));
    let mut worker = Process::start(&[]);
    let lines = [
        json!({ "request_id": "list", "prompt": "a", "controlnet": [{ "weigth": 1 }] }),
        json!({ "request_id": "alone", "prompt": "a", "controlnet": { "weigth": 1 } }),
        json!({ "request_id": "twins", "prompt": "a", "controlnet": [{ "image": "x", "input_image": "y" }] }),
        json!({ "request_id": "text", "prompt": "a", "controlnet": "x" }),
        json!({ "request_id": "array", "prompt": "a", "controlnet": [["x"]] }),
    ];
    for line in &lines {
        worker.send(line);
    }
    worker.close_stdin();
    let (answers, _) = worker.rest();
    let check = |id: &str, pointer: &str, text: &str, hint: Option<&str>| {
        let answer = answers.iter().find(|answer| answer["request_id"] == id).unwrap();
        assert_eq!(
            (code(answer), answer["error"]["pointer"].as_str()),
            ("invalid_parameter", Some(pointer)),
            "{answer}"
        );
        assert!(answer["error"]["message"].as_str().unwrap().contains(text), "{answer}");
        if let Some(hint) = hint {
            assert_eq!(answer["error"]["hint"], hint, "{answer}");
        }
    };
    check("list", "/controlnet/0/weigth", "is not a known key", Some("did you mean `weight`?"));
    check("alone", "/controlnet/weigth", "is not a known key", None);
    check("twins", "/controlnet/0/image", "two names of one field", None);
    check("text", "/controlnet", "an array of objects, or one object", None);
    check("array", "/controlnet/0", "must be an object", None);
}

#[test]
fn schema_accepts_one_controlnet_and_several() {
    let requests = validator("RequestLine");
    let line = |controlnet: serde_json::Value| json!({ "prompt": "a", "controlnet": controlnet });
    let good = [
        json!({ "model": "canny", "image": "a.png" }),
        json!([{ "model": "canny", "image": { "base64": "AAAA" }, "preprocessor": "canny", "weight": 0.5 }]),
        json!([{ "model": "canny", "input_image": "a.png", "module": "none", "guidance_start": 0.1, "guidance_end": 0.9 }]),
        json!([{ "model": "union", "image": "a.png", "control_type": "tile", "guess_mode": true, "resize_mode": "crop" }]),
        json!([{ "model": "canny", "image": "a.png", "preprocessor": "canny", "parameters": { "low_threshold": 50 } }]),
    ];
    for options in good {
        assert!(requests.is_valid(&line(options.clone())), "{options}");
    }
    for options in [
        json!("canny"),
        json!([{ "modle": "canny" }]),
        json!([{ "image": "a", "input_image": "b" }]),
        json!({ "weight": "1" }),
    ] {
        assert!(!requests.is_valid(&line(options.clone())), "{options}");
    }
}

/// Configurations of published networks, reduced to the sizes that decide whether they fit.
#[test]
fn published_controlnet_layouts_are_identified() {
    let plain = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"];
    let trunk = json!({
        "act_fn": "silu", "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "down_block_types": plain, "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": true, "class_embed_type": null, "encoder_hid_dim": null, "upcast_attention": null,
    });
    let with = |more: serde_json::Value| {
        let mut config = trunk.clone();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let up = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"];
    let unet: UnetConfig = serde_json::from_value(with(json!({ "up_block_types": up }))).unwrap();
    let check_for = |config: Option<serde_json::Value>, task: Option<[usize; 2]>, model: (&UnetConfig, usize)| {
        let shape = |name: &str| -> Option<&[usize]> {
            match name {
                "controlnet_cond_embedding.conv_in.weight" => Some(&[16, 3, 3, 3]),
                "controlnet_cond_embedding.blocks.1.weight" => Some(&[32, 16, 3, 3]),
                "controlnet_cond_embedding.blocks.3.weight" => Some(&[96, 32, 3, 3]),
                "controlnet_cond_embedding.blocks.5.weight" => Some(&[256, 96, 3, 3]),
                "task_embedding" => task.as_ref().map(<[usize; 2]>::as_slice),
                _ => None,
            }
        };
        let file: Option<ControlNetFile> = config.map(|config| serde_json::from_value(config).unwrap());
        let (unet, reduction) = model;
        let task = ControlNetConfigTask { name: "mine", file, shapes: &shape, unet, reduction };
        ControlNetConfig::new(task).map(|config| config.kinds())
    };
    let check = |config: Option<serde_json::Value>, kinds: Option<usize>| {
        check_for(config, kinds.map(|kinds| [kinds, 320]), (&unet, 8))
    };
    let rgb = json!({ "controlnet_conditioning_channel_order": "rgb", "conditioning_embedding_out_channels": [16, 32, 96, 256] });
    assert_eq!(check(Some(with(rgb.clone())), None).unwrap(), None);
    for reduction in [4, 16] {
        let error = check_for(Some(with(rgb.clone())), None, (&unet, reduction)).unwrap_err();
        assert!(error.to_string().contains("makes images 8 times smaller"), "{error}");
    }
    let small = json!({ "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D"], "mid_block_type": "UNetMidBlock2D" });
    assert_eq!(check(Some(with(small)), None).unwrap(), None);
    let union = json!({ "num_control_type": 8, "num_trans_channel": 320, "num_trans_head": 8, "num_trans_layer": 1 });
    assert_eq!(check(Some(with(union.clone())), Some(8)).unwrap(), Some(8));
    let narrow = check_for(Some(with(union)), Some([8, 160]), (&unet, 8)).unwrap_err();
    assert!(narrow.to_string().contains("has 160 channels, and its first feature map 320"), "{narrow}");
    let numbers = check(Some(with(json!({ "addition_time_embed_dim": 128 }))), None).unwrap_err();
    assert!(numbers.to_string().contains("it takes 128 channels for each added number"), "{numbers}");
    // The same number of feature maps and channels, at other resolutions.
    let even = json!({ "block_out_channels": [320, 320, 320], "attention_head_dim": 5, "up_block_types": up });
    let model: UnetConfig = serde_json::from_value(with(even.clone())).unwrap();
    assert_eq!(check_for(Some(with(even.clone())), None, (&model, 8)).unwrap(), None);
    let mut shifted = with(even);
    shifted["layers_per_block"] = json!([1, 2, 3]);
    let shifted = check_for(Some(shifted), None, (&model, 8)).unwrap_err();
    assert!(shifted.to_string().contains("other resolutions"), "{shifted}");
    let pooled = json!({ "global_pool_conditions": true });
    assert!(check(Some(with(pooled)), None).unwrap_err().to_string().contains("`global_pool_conditions`"));
    let sd15 = json!({ "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "transformer_layers_per_block": 1 });
    assert_eq!(check(Some(with(sd15)), None).unwrap_err().code(), "model_unsupported");
    assert_eq!(check(None, None).unwrap_err().code(), "model_unsupported", "a file without blocks");
}
