//! Folders in diffusers' layout whose JSON contradicts the weights or itself.

use std::fs;

use serde_json::{Value, json};

use super::{Corpus, tensors};

const CORRUPT: &[&str] = &["model_corrupt"];
const REFUSED: &[&str] = &["model_corrupt", "model_unsupported"];
const INDEX: &str = "model_index.json";
const UNET: &str = "unet/config.json";
const VAE: &str = "vae/config.json";
const FIRST: &str = "text_encoder/config.json";
const SECOND: &str = "text_encoder_2/config.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// Values that are invalid as a size.
fn sizes() -> Vec<Value> {
    let huge = json!(1_u64 << 40);
    vec![json!(0), json!(-1), huge, json!(u64::MAX), json!(1e300), json!(2.5), json!("4"), json!([]), json!({ "a": 1 })]
}

pub(super) fn add(corpus: &mut Corpus) {
    let mut lie = |kind: &'static str, file: &str, pointer: &str, value: &Value| {
        let text = value.to_string();
        let what = format!("{pointer} {}", &text[..text.len().min(40)]);
        corpus.model(kind, &what, REFUSED, |model| model.set(file, pointer, value.clone()));
    };
    for pointer in ["/in_channels", "/cross_attention_dim", "/norm_num_groups", "/addition_time_embed_dim"] {
        sizes().iter().for_each(|size| lie("config, UNet", UNET, pointer, size));
    }
    for pointer in ["/block_out_channels", "/transformer_layers_per_block", "/attention_head_dim"] {
        let lists = [json!([]), json!([1]), json!([-1, 0, 0]), json!(vec![1_u64 << 40; 3]), json!(vec![7; 100_000])];
        lists.iter().for_each(|list| lie("config, UNet", UNET, pointer, list));
        lie("config, UNet", UNET, pointer, &json!([32, "a", []]));
    }
    for pointer in ["/down_block_types", "/up_block_types"] {
        let lists = [json!([]), json!(["a", "b", "c"]), json!(5), json!(vec!["CrossAttnDownBlock2D"; 50_000])];
        lists.iter().for_each(|list| lie("config, UNet", UNET, pointer, list));
    }
    let more = [
        ("/layers_per_block", json!(1_u64 << 32)),
        ("/layers_per_block", json!(0)),
        ("/projection_class_embeddings_input_dim", json!(0)),
        ("/mid_block_type", json!("a")),
        ("/out_channels", json!(1_u64 << 40)),
        ("/transformer_layers_per_block", json!(1_000_000_000)),
    ];
    more.iter().for_each(|(pointer, value)| lie("config, UNet", UNET, pointer, value));
    for file in [FIRST, SECOND] {
        for pointer in ["/hidden_size", "/num_attention_heads", "/num_hidden_layers", "/intermediate_size"] {
            let all = sizes();
            all.iter().step_by(2).for_each(|size| lie("config, text encoder", file, pointer, size));
        }
        for pointer in ["/vocab_size", "/max_position_embeddings"] {
            [json!(0), json!(1_u64 << 40)].iter().for_each(|size| lie("config, text encoder", file, pointer, size));
        }
        lie("config, text encoder", file, "/hidden_act", &json!("a"));
    }
    for pointer in ["/latent_channels", "/layers_per_block", "/norm_num_groups"] {
        sizes().iter().for_each(|size| lie("config, VAE", VAE, pointer, size));
    }
    for list in [json!([]), json!([0]), json!(vec![1_u64 << 40; 4]), json!(vec![32; 60]), json!("a")] {
        lie("config, VAE", VAE, "/block_out_channels", &list);
    }
    [json!(0), json!("a"), json!(-1e300), json!([])].iter().for_each(|s| lie("config, VAE", VAE, "/scaling_factor", s));
    for (pointer, value) in [
        ("/num_train_timesteps", json!(0)),
        ("/num_train_timesteps", json!(1_u64 << 40)),
        ("/num_train_timesteps", json!("a")),
        ("/beta_start", json!([])),
        ("/beta_start", json!(1e300)),
        ("/beta_end", json!("a")),
        ("/beta_schedule", json!("a")),
        ("/prediction_type", json!("a")),
        ("/timestep_spacing", json!(7)),
    ] {
        lie("config, scheduler", SCHEDULER, pointer, &value);
    }
    whole_files(corpus);
    weights(corpus);
    tokenizers(corpus);
}

/// Invalid JSON files.
fn whole_files(corpus: &mut Corpus) {
    let texts: [(&str, Vec<u8>); 8] = [
        ("empty", vec![]),
        ("null", b"null".to_vec()),
        ("a list", b"[]".to_vec()),
        ("deep", b"{\"a\":".repeat(200_000)),
        ("NUL", vec![0; 1000]),
        ("not UTF-8", b"{\"a\":\"\xff\xfe\"}".to_vec()),
        ("five megabytes", [b"{\"a\":\"".to_vec(), vec![b'a'; 5 << 20], b"\"}".to_vec()].concat()),
        ("cut", b"{\"a\":1,".to_vec()),
    ];
    for file in [INDEX, UNET, VAE, FIRST, SCHEDULER] {
        for (what, text) in &texts {
            corpus.model("JSON", &format!("{file} {what}"), REFUSED, |model| model.write(file, text));
        }
    }
    let classes = ["StableDiffusionPipeline", "FluxPipeline", "../../x", "", &"a".repeat(1 << 20)];
    for class in classes {
        let what = format!("class {:.30}", class);
        corpus.model("JSON", &what, REFUSED, |model| model.set(INDEX, "/_class_name", json!(class)));
    }
    // A huge sparse file.
    for file in [INDEX, UNET, "tokenizer/vocab.json", "tokenizer/merges.txt"] {
        corpus.model("JSON", &format!("{file} of a terabyte"), CORRUPT, |model| {
            fs::File::create(model.fresh(file)).unwrap().set_len(1 << 40).unwrap();
        });
    }
}

fn weights(corpus: &mut Corpus) {
    let unet = "unet/diffusion_pytorch_model.safetensors";
    corpus.model("weights", "none in the UNet's file", CORRUPT, |model| model.write(unet, tensors([])));
    corpus.model("weights", "another network's", CORRUPT, |model| {
        model.write(unet, model.read("vae/diffusion_pytorch_model.safetensors"));
    });
    corpus.model("weights", "of a terabyte of nothing", CORRUPT, |model| {
        fs::File::create(model.fresh(unet)).unwrap().set_len(1 << 40).unwrap();
    });
    corpus.model("weights", "claimed and sparse", CORRUPT, |model| {
        let header = r#"{"conv_in.weight":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}"#;
        model.write(unet, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat());
        let file = fs::OpenOptions::new().write(true).open(model.path().join(unet)).unwrap();
        file.set_len(8 + header.len() as u64 + (1 << 40)).unwrap();
    });
    corpus.model("weights", "empty tensors of every name", CORRUPT, |model| {
        let names: Vec<String> = (0..50_000).map(|n| format!("down_blocks.{n}.weight")).collect();
        model.write(unet, tensors(names.iter().map(|name| (name.as_str(), vec![0, 1 << 30], 0.0))));
    });
    corpus.model("weights", "a name of a megabyte", CORRUPT, |model| {
        model.write(unet, tensors([("a".repeat(1 << 20).as_str(), vec![1], 0.0)]));
    });
    for file in [unet, "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"] {
        for length in [0, 7, 20_000, 1_000_000] {
            let mut path = None;
            corpus.model("weights", &format!("{file} cut off at {length} once it was looked at"), CORRUPT, |model| {
                let bytes = model.read(file);
                model.write(file, bytes);
                path = Some(model.path().join(file));
            });
            corpus.cut(path.unwrap(), length);
        }
    }
    for end in ["bin", "ckpt", "pt", "pth"] {
        corpus.model("weights", &format!("pickled, .{end}"), &["unsafe_format", "model_corrupt"], |model| {
            drop(model.fresh(unet));
            model.write(&format!("unet/diffusion_pytorch_model.{end}"), b"\x80\x02cos\nsystem\n(S'true'\ntR.");
        });
    }
    let index = "unet/diffusion_pytorch_model.safetensors.index.json";
    let maps = [
        ("outside", r#"{"weight_map":{"a":"../vae/diffusion_pytorch_model.safetensors"}}"#.to_owned()),
        ("absolute", r#"{"weight_map":{"a":"/etc/passwd"}}"#.to_owned()),
        ("itself", format!(r#"{{"weight_map":{{"a":"{}"}}}}"#, &index[5..])),
        ("a folder", r#"{"weight_map":{"a":"."}}"#.to_owned()),
        ("nothing", r#"{"weight_map":{"a":""}}"#.to_owned()),
        ("NUL", "{\"weight_map\":{\"a\":\"x\\u0000.safetensors\"}}".to_owned()),
        ("a number", r#"{"weight_map":{"a":1}}"#.to_owned()),
        ("pickled", r#"{"weight_map":{"a":"x.bin"}}"#.to_owned()),
        ("missing", r#"{"weight_map":{"a":"m-00001-of-99999.safetensors"}}"#.to_owned()),
        ("a hundred thousand", {
            let map: serde_json::Map<_, _> =
                (0..100_000).map(|n| (n.to_string(), json!(format!("m-{n}.safetensors")))).collect();
            json!({ "weight_map": map }).to_string()
        }),
    ];
    for (what, text) in maps {
        corpus.model("shards", what, &["model_corrupt", "unsafe_format"], |model| {
            drop(model.fresh(unet));
            model.write(index, text);
        });
    }
}

/// Tokenizers are loaded by the first prompt.
fn tokenizers(corpus: &mut Corpus) {
    let (vocab, merges) = ("tokenizer/vocab.json", "tokenizer/merges.txt");
    let texts: [(&str, Vec<u8>); 8] = [
        ("empty", vec![]),
        ("a list", b"[1]".to_vec()),
        ("no words", b"{}".to_vec()),
        ("negative numbers", br#"{"<|startoftext|>":-1,"<|endoftext|>":-2}"#.to_vec()),
        ("numbers beyond the vocabulary", br#"{"<|startoftext|>":4000000000,"<|endoftext|>":4000000001}"#.to_vec()),
        ("words of words", br#"{"<|startoftext|>":{"a":1}}"#.to_vec()),
        ("deep", b"{\"a\":".repeat(200_000)),
        ("zeros", vec![0; 4096]),
    ];
    for (what, text) in texts {
        corpus.model("tokenizer", &format!("vocabulary {what}"), REFUSED, |model| model.write(vocab, text));
    }
    let texts: [(&str, Vec<u8>); 4] = [
        ("not UTF-8", vec![0xff; 4096]),
        ("one word a line", b"a\nb\nc\n".repeat(10)),
        ("words that are not in the vocabulary", b"qqqqqq zzzzzzz\n".to_vec()),
        ("zeros", vec![0; 4096]),
    ];
    for (what, text) in texts {
        corpus.model("tokenizer", &format!("merges {what}"), REFUSED, |model| model.write(merges, text));
    }
}
