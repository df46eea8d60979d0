//! Single files: bit-equal to their folder, every variant identified by its header, and components of other files.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::fs;
use std::path::Path;

use candle_core::Device;
use sdxl_worker::context::Context;
use sdxl_worker::device::instructor::Placement;
use sdxl_worker::device::interface::{Dtype, Quantization};
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::layers::{Instructor, Nothing};
use sdxl_worker::model::instructor::{ModelInstructor, ModelResources};
use sdxl_worker::model::interface::{HubSettings, Inspection, ModelRequest, PinRequest, Request, Response, Settings};
use sdxl_worker::runtime::config::Config;
use sdxl_worker::scheduler::config::Prediction;

use super::conditioning::demo_folder;
use super::drawing::Worker;
use super::single_file::{File, WEIGHTS, single};
use super::single_layouts::{BASE, Build, Layout, big_clip, clip, sparse, vae};

fn worker(root: &Path) -> Worker {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![root.to_owned()];
    Worker::with(&config)
}

fn request(model: &str) -> GenerateRequest {
    GenerateRequest {
        prompt: Some("a red circle above a blue square".to_owned()),
        negative_prompt: Some("green".to_owned()),
        model: Some(model.to_owned()),
        steps: Some(3),
        seed: Some(7),
        width: Some(128),
        height: Some(128),
        ..GenerateRequest::default()
    }
}

/// Latents and pixels, as bytes.
fn drawn(worker: &mut Worker, request: &GenerateRequest) -> (Vec<u32>, Vec<u8>) {
    let (latents, pixels) = worker.draw(request).remove(0);
    let bits = latents.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    (bits, pixels.data)
}

fn ask(root: &Path, request: Request) -> Result<Response> {
    let hub = HubSettings { cache: Some("no-hub".into()), ..HubSettings::default() };
    let mut resources = ModelResources::new(&Settings { roots: vec![root.to_owned()], hub, ..Settings::default() });
    let scope = RequestScope::Query { residents: Vec::new() };
    ModelInstructor.instruct(request, scope.with(&mut resources), &Context::detached())
}

fn inspect(root: &Path, options: ModelRequest) -> Result<Inspection> {
    match ask(root, Request::Inspect(options))? {
        Response::Inspect(facts) => Ok(*facts),
        other => panic!("{other:?}"),
    }
}

fn named(model: &str) -> ModelRequest {
    ModelRequest { model: Some(model.to_owned()), ..ModelRequest::default() }
}

/// `folder` and `file.safetensors`: the demonstration model twice, in f16 or in f32.
fn twice(wide: bool) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("folder");
    demo_folder(&folder);
    if wide {
        for (_, file) in WEIGHTS {
            File::read(&folder.join(file)).widened().write(&folder.join(file));
        }
    }
    single(&folder, 1).write(&root.path().join("file.safetensors"));
    root
}

#[test]
fn single_file_and_folder_give_the_same_bytes() {
    for wide in [false, true] {
        let root = twice(wide);
        let mut worker = worker(root.path());
        let folder = drawn(&mut worker, &request("folder"));
        assert_eq!(folder, drawn(&mut worker, &request("file.safetensors")), "wide: {wide}");
        assert_eq!(folder, drawn(&mut worker, &request("file")), "wide: {wide}");
        let own = drawn(&mut Worker::new(), &request("demo"));
        assert_eq!(own, folder, "the embedded model, wide: {wide}");
    }
}

#[test]
fn single_files_are_listed_inspected_loaded_and_unloaded() {
    let root = twice(false);
    let write = |name: &str, layout: &Layout| sparse(layout, "F16", &[], &root.path().join(name));
    write("vae.safetensors", &vae());
    write("lora.safetensors", &Layout::from([("lora_unet_mid_block.lora_down.weight".to_owned(), vec![4, 4])]));
    write("control.safetensors", &Layout::from([("control_model.zero_convs.0.0.weight".to_owned(), vec![4, 4])]));
    fs::create_dir(root.path().join("below")).unwrap();
    fs::rename(root.path().join("file.safetensors"), root.path().join("below/file.safetensors")).unwrap();
    write("unet.safetensors", &BASE.single());
    let Response::List(list) = ask(root.path(), Request::List(Nothing {})).unwrap() else { panic!("list") };
    let seen: Vec<_> = list.models.iter().map(|m| (m.name.as_str(), m.family, m.problem.is_some())).collect();
    let base = Some("sdxl_base");
    let expected = [
        ("demo", base, false),
        ("below/file.safetensors", base, false),
        ("folder", base, false),
        ("unet.safetensors", None, true),
    ];
    assert_eq!(seen, expected);
    // A folder's files have their own headers.
    assert!(list.models[1].bytes.0.abs_diff(list.models[0].bytes.0) < 100_000, "{list:?}");

    let (file, folder) =
        (inspect(root.path(), named("below/file")).unwrap(), inspect(root.path(), named("folder")).unwrap());
    assert_eq!(file.model, "below/file.safetensors");
    let facts = |facts: &Inspection| {
        let parts = facts.components.iter().map(|c| (c.name, c.tensors, c.parameters, c.bytes, c.dtypes.clone()));
        (parts.collect::<Vec<_>>(), facts.vae.scaling_factor, facts.prediction_type, facts.default_width)
    };
    assert_eq!(facts(&file), facts(&folder));
    assert_eq!(file.pipeline, folder.pipeline);

    let mut resources = ModelResources::new(&Settings { roots: vec![root.path().to_owned()], ..Settings::default() });
    let placement = Placement {
        device: Device::Cpu,
        name: "cpu".to_owned(),
        compute: Dtype::F32,
        vae: Dtype::F32,
        quantization: Quantization::None,
        offloaded: false,
    };
    let (scope, ctx) = (RequestScope::Compute { placement }, Context::detached());
    let mut instruct = |request: Request| ModelInstructor.instruct(request, scope.with(&mut resources), &ctx).unwrap();
    let Response::Load(loaded) = instruct(Request::Load(named("below/file"))) else { panic!("load") };
    let Response::Load(same) = instruct(Request::Load(named("folder"))) else { panic!("load") };
    assert_eq!(loaded.bytes, same.bytes);
    let pin = PinRequest { model: Some("below/file.safetensors".to_owned()), revision: None, pin: Some(true) };
    let Response::Pin(pinned) = instruct(Request::Pin(pin)) else { panic!("pin") };
    assert_eq!(pinned.bytes, loaded.bytes);
    let Response::Unload(freed) = instruct(Request::Unload(named("below/file"))) else { panic!("unload") };
    assert_eq!(freed.models, ["below/file.safetensors"]);
    // Unloading a model frees it with any components.
    let mut apart = named("folder");
    apart.vae = Some("below/file".to_owned());
    instruct(Request::Load(apart));
    let Response::Unload(freed) = instruct(Request::Unload(named("folder"))) else { panic!("unload") };
    assert!(freed.freed.0 >= 2 * loaded.bytes.0, "{freed:?}");
}

/// A whole checkpoint around a UNet.
pub(crate) fn whole(unet: &Build) -> Layout {
    let encoders = if unet.context == 1280 { big_clip(0) } else { clip().into_iter().chain(big_clip(1)).collect() };
    unet.single().into_iter().chain(vae()).chain(encoders).collect()
}

pub(crate) const SSD_1B: Build = Build {
    down: &[None, Some(&[2, 2]), Some(&[4, 4])],
    mid: Some(0),
    up: &[Some(&[4, 4, 10]), Some(&[2, 1, 1]), None],
    ..BASE
};
pub(crate) const VEGA: Build = Build {
    down: &[None, Some(&[1, 1]), Some(&[2, 2])],
    mid: Some(0),
    up: &[Some(&[2, 2, 2]), Some(&[1, 1, 1]), None],
    ..BASE
};
pub(crate) const KOALA_700M: Build = Build {
    down: &[None, Some(&[2]), Some(&[5])],
    mid: None,
    up: &[Some(&[5, 5]), Some(&[2, 2]), None],
    layers: 1,
    ..BASE
};
pub(crate) const KOALA_1B: Build = Build {
    down: &[None, Some(&[2]), Some(&[6])],
    mid: Some(6),
    up: &[Some(&[6, 6]), Some(&[2, 2]), None],
    layers: 1,
    ..BASE
};
pub(crate) const REFINER: Build = Build {
    channels: &[384, 768, 1536, 1536],
    down: &[None, Some(&[4, 4]), Some(&[4, 4]), None],
    mid: Some(4),
    up: &[None, Some(&[4, 4, 4]), Some(&[4, 4, 4]), None],
    context: 1280,
    added: 2560,
    ..BASE
};

/// Tensors and texts that mark a file.
struct Marked<'a> {
    build: Build,
    marks: &'a [&'a str],
    metadata: &'a [(&'a str, &'a str)],
}

#[track_caller]
fn check(marked: &Marked, expected: (&str, Option<&str>, Prediction, bool)) -> Inspection {
    let root = tempfile::tempdir().unwrap();
    let mut layout = whole(&marked.build);
    for mark in marked.marks {
        layout.insert((*mark).to_owned(), if mark.contains("sigma") { vec![] } else { vec![0] });
    }
    sparse(&layout, "F16", marked.metadata, &root.path().join("m.safetensors"));
    let facts = inspect(root.path(), named("m")).unwrap();
    let got = (facts.family, facts.variant, facts.prediction_type, facts.scheduler.zero_terminal_snr);
    assert_eq!(got, expected, "{:?} {:?}", marked.marks, marked.metadata);
    facts
}

#[test]
fn variants_are_identified_by_names_and_shapes() {
    let (epsilon, v) = (Prediction::Epsilon, Prediction::VPrediction);
    let plain = |build: Build| Marked { build, marks: &[], metadata: &[] };
    let inputs = |inputs| Build { inputs, ..BASE };
    let facts = check(&plain(BASE), ("sdxl_base", None, epsilon, false));
    let counts: Vec<_> = facts.components.iter().map(|c| (c.name, c.parameters)).collect();
    // The counts of the published networks.
    let published =
        [("text_encoder", 123_060_480), ("text_encoder_2", 694_659_840), ("unet", 2_567_463_684), ("vae", 83_653_863)];
    assert_eq!(counts, published);
    assert_eq!((facts.vae.scaling_factor, facts.default_width, facts.unet.context), (0.13025, 1024, 2048));
    assert!(facts.force_zeros_for_empty_prompt);
    let refiner = check(&plain(REFINER), ("sdxl_refiner", None, epsilon, false));
    assert_eq!((refiner.text_encoders.len(), refiner.force_zeros_for_empty_prompt), (1, false));
    check(&plain(inputs(9)), ("sdxl_inpaint", None, epsilon, false));
    check(&plain(inputs(8)), ("sdxl_instruct_pix2pix", None, epsilon, false));
    check(&plain(SSD_1B), ("ssd_1b", None, epsilon, false));
    check(&plain(VEGA), ("segmind_vega", None, epsilon, false));
    check(&plain(KOALA_700M), ("koala_700m", None, epsilon, false));
    check(&plain(KOALA_1B), ("koala_1b", None, epsilon, false));
    for (build, parameters) in [(SSD_1B, 1_300_000_000), (VEGA, 745_000_000), (KOALA_700M, 782_000_000)] {
        let facts = check(&plain(build), (check_family(&build), None, epsilon, false));
        let unet = facts.components.iter().find(|c| c.name == "unet").unwrap().parameters;
        println!("{}: {unet} parameters", facts.family);
        assert!(unet.abs_diff(parameters) < parameters / 20, "{}: {unet}", facts.family);
    }
    let marked = |marks| Marked { build: BASE, marks, metadata: &[] };
    check(&marked(&["v_pred"]), ("sdxl_base", Some("v_prediction"), v, false));
    check(&marked(&["ztsnr"]), ("sdxl_base", None, epsilon, false));
    check(&marked(&["v_pred", "ztsnr"]), ("sdxl_base", Some("v_prediction"), v, true));
    check(&marked(&["edm_mean", "edm_std"]), ("sdxl_base", Some("playground_v2_5"), epsilon, false));
    check(&marked(&["edm_vpred.sigma_max", "edm_vpred.sigma_min"]), ("sdxl_base", Some("cosxl"), v, false));
    let edit = Marked { build: inputs(8), marks: &["edm_vpred.sigma_max"], metadata: &[] };
    check(&edit, ("sdxl_instruct_pix2pix", Some("cosxl"), v, false));
    let with_metadata = |metadata| Marked { build: BASE, marks: &[], metadata };
    check(&with_metadata(&[("modelspec.title", "SDXL Turbo")]), ("sdxl_base", Some("turbo"), epsilon, false));
    check(
        &with_metadata(&[("modelspec.title", "DreamShaper XL Lightning")]),
        ("sdxl_base", Some("lightning"), epsilon, false),
    );
    check(&with_metadata(&[("modelspec.prediction_type", "v")]), ("sdxl_base", Some("v_prediction"), v, false));
    check(&with_metadata(&[("modelspec.prediction_type", "epsilon")]), ("sdxl_base", None, epsilon, false));
}

fn check_family(build: &Build) -> &'static str {
    match (build.layers, build.down[1]) {
        (1, _) => "koala_700m",
        (_, Some([1, 1])) => "segmind_vega",
        _ => "ssd_1b",
    }
}

#[test]
fn fp8_files_are_reported_as_stored() {
    let root = tempfile::tempdir().unwrap();
    sparse(&whole(&BASE), "F8_E4M3", &[], &root.path().join("m.safetensors"));
    let facts = inspect(root.path(), named("m")).unwrap();
    assert!(facts.components.iter().all(|c| c.dtypes == ["f8_e4m3"]), "{:?}", facts.components);
    assert_eq!(facts.family, "sdxl_base");
}

#[track_caller]
fn check_refused(layout: &Layout, says: &str) {
    let root = tempfile::tempdir().unwrap();
    sparse(layout, "F16", &[], &root.path().join("m.safetensors"));
    let error = inspect(root.path(), named("m.safetensors")).unwrap_err();
    assert_eq!(error.code(), "model_unsupported", "{error}");
    assert!(error.to_string().contains(says), "must say {says:?}, says {error}");
    let Response::List(list) = ask(root.path(), Request::List(Nothing {})).unwrap() else { panic!("list") };
    assert!(
        list.models.len() == 1
            || layout.keys().any(|name| name.contains("label_emb") || name.contains("add_embedding")),
        "{says}: {list:?}"
    );
}

#[test]
fn foreign_single_file_is_named() {
    let one = |name: &str, shape: &[usize]| Layout::from([(name.to_owned(), shape.to_vec())]);
    let with = |mut layout: Layout, name: &str| {
        layout.insert(name.to_owned(), vec![4, 4]);
        layout
    };
    let unet = one("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", &[320, 768]);
    let sd1 = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
    check_refused(&with(unet.clone(), sd1), "Stable Diffusion 1 model");
    check_refused(&unet, "UNet of Stable Diffusion 1");
    check_refused(&with(unet, "cond_stage_model.model.ln_final.weight"), "Stable Diffusion 2 model");
    check_refused(&one("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", &[4]), "Stable Diffusion 3");
    check_refused(&one("double_blocks.0.img_attn.qkv.weight", &[4]), "Flux");
    check_refused(&one("lora_unet_input_blocks_1_1.lora_down.weight", &[4]), "a LoRA");
    check_refused(&one("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", &[4]), "a LoRA");
    check_refused(&one("control_model.input_hint_block.0.weight", &[4]), "a ControlNet");
    check_refused(&one("controlnet_cond_embedding.conv_in.weight", &[4]), "a ControlNet");
    check_refused(&vae(), "an autoencoder without a UNet");
    check_refused(&clip(), "a text encoder without a UNet");
    check_refused(&one("something.else", &[4]), "`something.else`");
    check_refused(&Layout::new(), "no tensors");
    let missing = BASE.single();
    check_refused(&missing, "no `text_encoder` and no `text_encoder_2` and no `vae`");
    check_refused(&missing, r#""vae": "FILE""#);
    check_refused(&BASE.layout(), "no `text_encoder` and no `text_encoder_2` and no `vae`");
    let without_vae: Layout = missing.into_iter().chain(clip()).chain(big_clip(1)).collect();
    check_refused(&without_vae, "no `vae`:");
}

#[test]
fn pickles_are_refused_whatever_their_name() {
    let root = tempfile::tempdir().unwrap();
    let zip = b"PK\x03\x04\0\0\x08\x08\0\0archive/data.pkl".to_vec();
    let pickle = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".to_vec();
    for (name, bytes) in [
        ("a.ckpt", b"x".to_vec()),
        ("a.pt", b"x".to_vec()),
        ("a.pth", b"x".to_vec()),
        ("a.bin", b"x".to_vec()),
        ("zip.safetensors", zip.clone()),
        ("pickle.safetensors", pickle.clone()),
        ("zip", zip),
        ("pickle.model", pickle),
    ] {
        fs::write(root.path().join(name), bytes).unwrap();
        let error = inspect(root.path(), named(name)).unwrap_err();
        assert_eq!(error.code(), "unsafe_format", "{name}: {error}");
        let request = ModelRequest { vae: Some(name.to_owned()), ..ModelRequest::default() };
        let error = inspect(root.path(), request).unwrap_err();
        assert_eq!(error.code(), "unsafe_format", "{name}: {error}");
    }
    let Response::List(list) = ask(root.path(), Request::List(Nothing {})).unwrap() else { panic!("list") };
    assert_eq!(list.models.len(), 1);
}

#[test]
fn components_of_other_files_replace_the_models() {
    let root = twice(false);
    let path = |name: &str| root.path().join(name);
    let mut file = File::read(&path("file.safetensors"));
    let whole = single(&path("folder"), 1);
    // Another autoencoder: the same with inverted brightness.
    let mut other = File::default();
    for (name, (dtype, shape, bytes)) in file.tensors.clone() {
        let Some(name) = name.strip_prefix("first_stage_model.") else { continue };
        let mut bytes = bytes;
        if name == "decoder.conv_out.weight" {
            bytes.chunks_exact_mut(2).for_each(|pair| pair[1] ^= 0x80);
        }
        other.tensors.insert(name.to_owned(), (dtype, shape, bytes));
    }
    other.metadata.insert("config.vae".to_owned(), whole.metadata["config.vae"].clone());
    other.write(&path("other-vae.safetensors"));
    // The model without its autoencoder and encoders.
    file.tensors.retain(|name, _| name.starts_with("model.diffusion_model."));
    file.metadata = whole.metadata.clone();
    file.write(&path("unet.safetensors"));

    let mut worker = worker(root.path());
    let plain = drawn(&mut worker, &request("folder"));
    let with = |model: &str, change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = request(model);
        change(&mut request);
        request
    };
    let own = |name: &str| Some(name.to_owned());
    // Components with the same values change nothing.
    for part in ["file.safetensors", "file", "folder"] {
        let all = with("unet", &|r| {
            r.vae = own(part);
            r.text_encoder = own(part);
            r.text_encoder_2 = own(part);
        });
        assert_eq!(plain, drawn(&mut worker, &all), "{part}");
        assert_eq!(plain, drawn(&mut worker, &with("folder", &|r| r.unet = own(part))), "{part}");
    }
    assert_eq!(plain, drawn(&mut worker, &with("demo", &|r| r.vae = own("folder/vae"))));
    assert_eq!(plain, drawn(&mut worker, &with("folder", &|r| r.unet = own("unet"))));
    let inverted = drawn(&mut worker, &with("folder", &|r| r.vae = own("other-vae")));
    assert_eq!(plain.0, inverted.0, "the latents are the UNet's");
    assert_ne!(plain.1, inverted.1, "the picture is the other autoencoder's");
    // The caches keep them apart.
    assert_eq!(plain, drawn(&mut worker, &request("folder")));
    assert_eq!(inverted, drawn(&mut worker, &with("file", &|r| r.vae = own("other-vae.safetensors"))));

    let refused = |request: &GenerateRequest, worker: &mut Worker, says: &str| {
        let Err(error) = worker.instructors.inference.plan(request, &mut worker.managers) else { panic!("{says}") };
        assert!(matches!(error, Error::ModelUnsupported { .. }), "{error}");
        assert!(error.to_string().contains(says), "must say {says:?}, says {error}");
    };
    refused(&request("unet"), &mut worker, "no `text_encoder` and no `text_encoder_2` and no `vae`");
    refused(&with("folder", &|r| r.unet = own("other-vae")), &mut worker, "no `unet`");
    refused(&with("folder", &|r| r.text_encoder_2 = own("folder/text_encoder")), &mut worker, "its text encoders give");
    fs::copy(path("folder/text_encoder/model.safetensors"), path("clip_l.safetensors")).unwrap();
    let narrow = with("folder", &|r| r.text_encoder = own("clip_l"));
    refused(&narrow, &mut worker, "32 channels are not a multiple of 64");
    let mut clip = File::read(&path("clip_l.safetensors"));
    clip.metadata.insert("config.text_encoder".to_owned(), whole.metadata["config.text_encoder"].clone());
    clip.write(&path("clip_l.safetensors"));
    assert_eq!(plain, drawn(&mut worker, &narrow));
    let echoed = with("folder", &|r| r.vae = own("other-vae"));
    let plan = worker.instructors.inference.plan(&echoed, &mut worker.managers).unwrap();
    assert_eq!(GenerateRequest::from(&plan).vae.as_deref(), Some("other-vae"));
}
