//! Hostile component files: ControlNets, T2I-Adapters, IP-Adapters and their encoders, textual inversions.

use std::fs;

use serde_json::{Value, json};

use super::{Corpus, tensors};
use crate::random_networks::Layout;

const REFUSED: &[&str] = &["model_corrupt", "model_unsupported", "unsupported_feature"];
const PICKLED: &[&str] = &["unsafe_format", "model_unsupported"];

/// A request that names a file.
type RequestFor = fn(&str) -> Value;
/// A tensor's name, shape, and the value of its elements.
type Filled = (&'static str, &'static [usize], f32);

fn control(name: &str) -> Value {
    json!({ "controlnet": [{ "model": name, "image": "edges.png" }] })
}

fn t2i(name: &str) -> Value {
    json!({ "t2i_adapter": { "model": name, "image": "edges.png" } })
}

fn ip(name: &str) -> Value {
    json!({ "ip_adapter": { "model": name, "image": "edges.png", "image_encoder": name } })
}

fn embedding(name: &str) -> Value {
    json!({ "prompt": "a zz lake", "embeddings": [{ "name": name, "token": "zz" }] })
}

pub(super) fn add(corpus: &mut Corpus) {
    files(corpus);
    configs(corpus);
    controlnets(corpus);
    let vectors: &[(&str, &[Filled])] = &[
        ("no tensors", &[]),
        ("one encoder's", &[("clip_g", &[1, 64], 0.1)]),
        ("another width", &[("clip_l", &[1, 768], 0.1), ("clip_g", &[1, 1280], 0.1)]),
        ("another count", &[("clip_l", &[1, 32], 0.1), ("clip_g", &[2, 64], 0.1)]),
        ("no vectors", &[("clip_l", &[0, 32], 0.1), ("clip_g", &[0, 64], 0.1)]),
        ("a thousand vectors", &[("clip_l", &[1000, 32], 0.1), ("clip_g", &[1000, 64], 0.1)]),
        ("three axes", &[("clip_l", &[1, 1, 32], 0.1), ("clip_g", &[1, 1, 64], 0.1)]),
        ("2^40 empty vectors", &[("clip_l", &[1 << 40, 0], 0.1), ("clip_g", &[1 << 40, 0], 0.1)]),
        ("not numbers", &[("clip_l", &[1, 32], f32::NAN), ("clip_g", &[1, 64], f32::NAN)]),
        ("infinite", &[("clip_l", &[1, 32], f32::INFINITY), ("clip_g", &[1, 64], f32::INFINITY)]),
    ];
    for (what, all) in vectors {
        let bytes = tensors(all.iter().map(|(name, shape, value)| (*name, shape.to_vec(), *value)));
        let codes = &["model_unsupported", "model_corrupt", "numerical_error"];
        corpus.file("embedding", what, "safetensors", bytes, embedding, codes);
    }
}

/// Files of other kinds in place of each.
fn files(corpus: &mut Corpus) {
    let kinds: [(&str, RequestFor); 4] =
        [("ControlNet", control), ("T2I-Adapter", t2i), ("IP-Adapter", ip), ("embedding", embedding)];
    for (kind, fields) in kinds {
        for end in ["ckpt", "pt", "pth", "bin"] {
            let pickle = b"\x80\x02cos\nsystem\n(S'true'\ntR.";
            corpus.file("pickles", &format!("{kind} .{end}"), end, pickle, fields, PICKLED);
        }
        let zip = b"PK\x03\x04\x14\0\0\0\0\0archive/data.pkl";
        corpus.file("archives", &format!("{kind} .zip"), "zip", zip, fields, PICKLED);
        corpus.file("archives", &format!("{kind}, zip by another name"), "safetensors", zip, fields, PICKLED);
        corpus.file("foreign", &format!("{kind} without tensors"), "safetensors", tensors([]), fields, REFUSED);
        let one = tensors([("a.b.c", vec![3, 3], 1.0)]);
        corpus.file("foreign", &format!("{kind} of one tensor"), "safetensors", one, fields, REFUSED);
        let many: Vec<String> = (0..20_000).map(|n| format!("down_blocks.{n}.resnets.{n}.conv1.weight")).collect();
        let many = tensors(many.iter().map(|name| (name.as_str(), vec![1], 0.5)));
        corpus.file("foreign", &format!("{kind} of 20 000 blocks"), "safetensors", many, fields, REFUSED);
        let long = tensors([("controlnet_".repeat(100_000).as_str(), vec![1], 0.5)]);
        corpus.file("foreign", &format!("{kind} of a long name"), "safetensors", long, fields, REFUSED);
    }
    for name in
        ["image_proj.proj.weight", "image_proj.latents", "ip_adapter.1.to_k_ip.weight", "image_proj.norm.weight"]
    {
        for shape in [vec![], vec![0], vec![1], vec![1 << 40, 0], vec![0, 96], vec![4, 96, 1]] {
            let what = format!("IP-Adapter, {name} of {shape:?}");
            let file = tensors([(name, shape, 0.5), ("ip_adapter.3.to_v_ip.weight", vec![2, 2], 0.5)]);
            corpus.file("foreign", &what, "safetensors", file, ip, REFUSED);
        }
    }
}

/// Folders with a wrong `config.json`.
fn configs(corpus: &mut Corpus) {
    let texts = ["", "null", "[]", "{", "{}", &"[".repeat(100_000), r#"{"_class_name":5}"#, r#"{"channels":"a"}"#];
    let kinds: [(&'static str, RequestFor); 3] =
        [("config, ControlNet", control), ("config, T2I-Adapter", t2i), ("config, IP-Adapter", ip)];
    for (kind, fields) in kinds {
        for text in texts {
            let (name, what) = (corpus.name("companion"), format!("{text:.20}"));
            let folder = corpus.root().join(&name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("config.json"), text).unwrap();
            fs::write(folder.join("diffusion_pytorch_model.safetensors"), tensors([("a", vec![1], 1.0)])).unwrap();
            corpus.case(kind, &what, vec![super::generate(&fields(&name))], REFUSED);
        }
    }
    let adapter = |pointer: &str, value: Value| {
        let mut config = json!({ "adapter_type": "full_adapter_xl", "channels": [32, 96, 160], "downscale_factor": 16,
                                 "in_channels": 3, "num_res_blocks": 2 });
        config[pointer] = value;
        config
    };
    for value in [json!(0), json!(1_u64 << 40), json!(-1), json!("a"), json!([]), json!(vec![1_u64 << 40; 3])] {
        for pointer in ["channels", "downscale_factor", "in_channels", "num_res_blocks", "adapter_type"] {
            let (name, what) = (corpus.name("companion"), format!("{pointer} {value}"));
            let folder = corpus.root().join(&name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("config.json"), adapter(pointer, value.clone()).to_string()).unwrap();
            fs::write(folder.join("diffusion_pytorch_model.safetensors"), tensors([("a", vec![1], 1.0)])).unwrap();
            corpus.case("config, T2I-Adapter", &what, vec![super::generate(&t2i(&name))], REFUSED);
        }
    }
}

/// A network with a single fault.
fn controlnets(corpus: &mut Corpus) {
    let half = Layout::open("control_small").tensors.len() / 2;
    let mut broken = |what: &str, change: &dyn Fn(&mut Layout)| {
        let name = corpus.name("control");
        let mut layout = Layout::open("control_small");
        change(&mut layout);
        layout.write(corpus.root(), &name);
        corpus.case("ControlNet", what, vec![super::generate(&control(&name))], REFUSED);
    };
    // Its other settings come from the tensors, as for single files.
    for field in ["block_out_channels", "cross_attention_dim", "layers_per_block", "norm_num_groups"] {
        for value in [json!(0), json!(1_u64 << 40), json!([0, 0, 0]), json!("a"), json!(vec![1_u64 << 40; 3])] {
            let label = format!("{field} {value}");
            broken(&label, &|layout| layout.config.as_mut().unwrap()[field] = value.clone());
        }
    }
    broken("the last tensor is missing", &|layout| drop(layout.tensors.pop()));
    broken("the first tensor is empty", &|layout| layout.tensors[0].1 = vec![0, 4]);
    broken("every side is 1", &|layout| {
        layout.tensors.iter_mut().for_each(|(_, shape, ..)| shape.iter_mut().for_each(|side| *side = 1));
    });
    broken("half of it", &|layout| layout.tensors.truncate(half));
}
