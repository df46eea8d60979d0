//! Hostile and foreign weight files: each is a typed error that names the file.

use std::fs;
use std::path::Path;

use sdxl_worker::layers::Nothing;
use sdxl_worker::model::interface::{Request, Response};
use sdxl_worker::units::Bytes;

use super::{Copy, VAE, ask, change_header, headers, named};

const TEXT_ENCODER: &str = "text_encoder/model.safetensors";

#[test]
fn hostile_weight_files_are_typed_errors() {
    let copy = Copy::new();
    for (what, bytes) in headers::all() {
        fs::write(copy.path(TEXT_ENCODER), bytes).unwrap();
        let code = headers::codes(what)[0];
        copy.check(what, Request::Inspect(named("copy")), code, TEXT_ENCODER);
        copy.check(what, Request::Load(named("copy")), code, TEXT_ENCODER);
    }
    // The listing has it with its problem, and the other models as before.
    let Response::List(list) = ask(Request::List(Nothing {}), &mut copy.resources()).unwrap() else { panic!("list") };
    assert_eq!(list.models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["demo", "copy"]);
}

#[test]
fn irregular_files_are_refused_unopened() {
    let copy = Copy::new();
    fs::remove_file(copy.path(VAE)).unwrap();
    copy.check("missing", Request::Inspect(named("copy")), "model_corrupt", "has no weights");
    fs::create_dir(copy.path(VAE)).unwrap();
    copy.check("directory", Request::Inspect(named("copy")), "model_corrupt", "is a directory");
    fs::remove_dir(copy.path(VAE)).unwrap();
    #[cfg(unix)]
    {
        let status = std::process::Command::new("mkfifo").arg(copy.path(VAE)).status().unwrap();
        assert!(status.success());
        copy.check("pipe", Request::Inspect(named("copy")), "model_corrupt", "not a regular file");
        fs::remove_file(copy.path(VAE)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", copy.path(VAE)).unwrap();
        copy.check("device", Request::Inspect(named("copy")), "path_not_allowed", "");
        fs::remove_file(copy.path(VAE)).unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::os::unix::fs::symlink(outside.path(), copy.path(VAE)).unwrap();
        copy.check("link", Request::Inspect(named("copy")), "path_not_allowed", "");
        fs::remove_file(copy.path(VAE)).unwrap();
        // Download caches use links within the root.
        fs::rename(copy.path("vae/config.json"), copy.root.path().join("blob")).unwrap();
        std::os::unix::fs::symlink("../../blob", copy.path("vae/config.json")).unwrap();
    }
    for name in ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.CKPT"] {
        fs::write(copy.path("vae").join(name), b"\x80\x02").unwrap();
        copy.check(name, Request::Inspect(named("copy")), "unsafe_format", "pickle");
        fs::remove_file(copy.path("vae").join(name)).unwrap();
    }
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(VAE);
    fs::copy(demo, copy.path("vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    ask(Request::Inspect(named("copy")), &mut copy.resources()).unwrap();
}

#[test]
fn shape_mismatch_names_the_tensor_and_both_shapes() {
    let copy = Copy::new();
    let load = || Request::Load(named("copy"));
    let name = "decoder.conv_in.weight";
    change_header(&copy, |header| {
        let entry = header.remove(name).unwrap();
        header.insert("renamed".into(), entry);
    });
    copy.check(
        "missing",
        load(),
        "model_corrupt",
        "tensor `decoder.conv_in.weight` of shape [128, 4, 3, 3] is missing",
    );
    change_header(&copy, |header| header[name]["shape"] = [4, 128, 3, 3].into());
    copy.check("misshapen", load(), "model_corrupt", "must be of shape [128, 4, 3, 3], and is of shape [4, 128, 3, 3]");
    change_header(&copy, |header| header[name]["dtype"] = "I16".into());
    copy.check("integers", load(), "model_corrupt", "tensor `decoder.conv_in.weight`");
    change_header(&copy, |header| {
        header[name]["dtype"] = "F8_E4M3".into();
        header[name]["shape"] = [256, 4, 3, 3].into();
    });
    copy.check("eight bits", load(), "model_corrupt", "and is of shape [256, 4, 3, 3]");
    // VAE names from before 2023 are accepted.
    change_header(&copy, |header| {
        for (new, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
            for half in ["encoder", "decoder"] {
                for end in ["weight", "bias"] {
                    let name = |part: &str| format!("{half}.mid_block.attentions.0.{part}.{end}");
                    let entry = header.remove(&name(new)).unwrap();
                    header.insert(name(old), entry);
                }
            }
        }
    });
    ask(load(), &mut copy.resources()).unwrap();
}

#[test]
fn sharded_weights_load_as_one_network() {
    let copy = Copy::new();
    let file = fs::read(copy.path(VAE)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        tensors.tensors().into_iter().partition(|(n, _)| n.starts_with("enc"));
    let index = |first: &[(String, _)], second: &[(String, _)]| {
        let map = |all: &[(String, _)], file: &str| {
            all.iter().map(|(n, _): &(String, _)| (n.clone(), file.to_owned())).collect::<Vec<_>>()
        };
        let map: serde_json::Map<String, serde_json::Value> = map(first, "m-1.safetensors")
            .into_iter()
            .chain(map(second, "m-2.safetensors"))
            .map(|(n, f)| (n, f.into()))
            .collect();
        serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()
    };
    let write = |first: &[(String, safetensors::tensor::TensorView)],
                 second: &[(String, safetensors::tensor::TensorView)]| {
        for (name, part) in [("m-1", first), ("m-2", second)] {
            let part = part.iter().map(|(n, v)| (n.as_str(), v));
            safetensors::serialize_to_file(part, None, &copy.path(&format!("vae/{name}.safetensors"))).unwrap();
        }
    };
    let index_path = copy.path("vae/diffusion_pytorch_model.safetensors.index.json");
    fs::remove_file(copy.path(VAE)).unwrap();
    write(&first, &second);
    fs::write(&index_path, index(&first, &second)).unwrap();
    let Response::Load(loaded) = ask(Request::Load(named("copy")), &mut copy.resources()).unwrap() else {
        panic!("load")
    };
    assert_eq!(loaded.components[2].bytes, Bytes(6_833_566 - 8 - header_length(&file)));

    let inspect = || Request::Inspect(named("copy"));
    fs::write(&index_path, index(&second, &first)).unwrap();
    copy.check("exchanged", inspect(), "model_corrupt", "which does not have it");
    for name in ["../vae/m-1.safetensors", "/etc/passwd", "m-1.bin", "m-3.safetensors"] {
        fs::write(&index_path, format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#)).unwrap();
        copy.check(name, inspect(), "model_corrupt", "");
    }
    for text in ["", "{}", "[]", r#"{"weight_map":{}}"#, r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":1}}"#] {
        fs::write(&index_path, text).unwrap();
        copy.check(text, inspect(), "model_corrupt", "index.json");
    }
    fs::write(&index_path, index(&first, &second)).unwrap();
    second.push(first.pop().unwrap());
    first.push(second[0].clone());
    write(&first, &second);
    copy.check("in both", inspect(), "model_corrupt", "another file of the same model has too");
}

fn header_length(file: &[u8]) -> u64 {
    u64::from_le_bytes(file[..8].try_into().unwrap())
}
