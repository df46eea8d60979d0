//! Checkpoints by name, and the caches of loaded networks.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

pub(crate) mod headers;
mod weights;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::Device;
use sdxl_worker::context::{CancelToken, Context, Progress};
use sdxl_worker::device::instructor::Placement;
use sdxl_worker::device::interface::{Dtype, Quantization};
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::layers::{Instructor, Manager, Nothing, ResidentForm};
use sdxl_worker::model::checkpoint::families::FAMILIES;
use sdxl_worker::model::checkpoint::{Checkpoint, Part};
use sdxl_worker::model::instructor::{ModelInstructor, ModelResources};
use sdxl_worker::model::interface::{
    HubSettings, LoadedComponent, ModelRequest, PinRequest, Request, Response, Settings,
};

use sdxl_worker::model::managers::{Budget, Reach, Shelf, ShelfKey};
use sdxl_worker::model::networks::unet::Unet;
use sdxl_worker::units::Bytes;

use crate::conditioning::demo_folder;

fn resources(roots: Vec<PathBuf>) -> ModelResources {
    // Tests must not read this machine's hub cache.
    let hub = HubSettings { cache: Some("no-hub".into()), ..HubSettings::default() };
    ModelResources::new(&Settings { roots, hub, ..Settings::default() })
}

fn placement(compute: Dtype, quantization: Quantization) -> Placement {
    let (device, name) = (Device::Cpu, "cpu".to_owned());
    Placement { device, name, compute, vae: Dtype::F32, quantization, offloaded: false }
}

fn on_cpu() -> RequestScope {
    RequestScope::Compute { placement: placement(Dtype::F32, Quantization::None) }
}

fn ask(request: Request, resources: &mut ModelResources) -> Result<Response> {
    ModelInstructor.instruct(request, on_cpu().with(resources), &Context::detached())
}

fn load(resources: &mut ModelResources, placement: Placement) -> Response {
    let scope = RequestScope::Compute { placement };
    let request = Request::Load(ModelRequest::default());
    ModelInstructor.instruct(request, scope.with(resources), &Context::detached()).unwrap()
}

fn named(model: &str) -> ModelRequest {
    ModelRequest { model: Some(model.to_owned()), ..ModelRequest::default() }
}

/// A root that holds one copy of the demonstration model, called `copy`.
struct Copy {
    root: tempfile::TempDir,
}

impl Copy {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        demo_folder(&root.path().join("copy"));
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("copy").join(name)
    }

    fn resources(&self) -> ModelResources {
        resources(vec![self.root.path().to_owned()])
    }

    #[track_caller]
    fn check(&self, what: &str, request: Request, code: &str, says: &str) {
        let error = match ask(request, &mut self.resources()) {
            Ok(answer) => panic!("{what}: must be {code}, and is {answer:?}"),
            Err(error) => error,
        };
        assert_eq!(error.code(), code, "{what}: {error}");
        assert!(error.to_string().contains(says), "{what}: must say {says:?}, says {error}");
    }
}

const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// Rewrites the header of the copy's VAE.
fn change_header(copy: &Copy, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let file = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(VAE)).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&file[8..8 + length]).unwrap();
    change(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let changed = [&(header.len() as u64).to_le_bytes()[..], &header, &file[8 + length..]].concat();
    fs::write(copy.path(VAE), changed).unwrap();
}

#[test]
fn foreign_model_folder_is_named() {
    let copy = Copy::new();
    let index = fs::read_to_string(copy.path("model_index.json")).unwrap();
    let check = |what: &str, file: &str, text: &str, code: &str, says: &str| {
        let before = fs::read(copy.path(file)).ok();
        fs::write(copy.path(file), text).unwrap();
        copy.check(what, Request::Inspect(named("copy")), code, says);
        before.map_or_else(|| fs::remove_file(copy.path(file)), |before| fs::write(copy.path(file), before)).unwrap();
    };
    let class = |name: &str| index.replace("StableDiffusionXLPipeline", name);
    let m = "model_index.json";
    check("flux", m, &class("FluxPipeline"), "model_unsupported", "`FluxPipeline`");
    check("sd 1.5", m, &class("StableDiffusionPipeline"), "model_unsupported", "`StableDiffusionPipeline`");
    check("one encoder", m, &index.replace("text_encoder_2", "other"), "model_unsupported", "`text_encoder_2`");
    let none = index.replace("\"diffusers\",\n  \"UNet2DConditionModel\"", "null,\n  null");
    check("no unet", m, &none, "model_unsupported", "`unet`");
    check("index empty", m, "", "model_corrupt", "model_index.json");
    check("index a list", m, "[]", "model_corrupt", "model_index.json");
    check("index without class", m, "{}", "model_corrupt", "_class_name");
    check("index too long", m, &" ".repeat(5 << 20), "model_corrupt", "at most");
    check("deep", m, &"[".repeat(1 << 20), "model_corrupt", "model_index.json");
    let unet = fs::read_to_string(copy.path("unet/config.json")).unwrap();
    let seven = unet.replace("\"in_channels\": 4", "\"in_channels\": 7");
    check("depth", "unet/config.json", &seven, "model_unsupported", "7 channels");
    let zero = unet.replace("\"norm_num_groups\": 16", "\"norm_num_groups\": 0");
    check("no groups", "unet/config.json", &zero, "model_unsupported", "norm_num_groups");
    check("unet broken", "unet/config.json", "{", "model_corrupt", "unet/config.json");
    let wide = fs::read_to_string(copy.path("vae/config.json"))
        .unwrap()
        .replace("\"latent_channels\": 4", "\"latent_channels\": -4");
    check("negative", "vae/config.json", &wide, "model_corrupt", "vae/config.json");
    check("schedule", "scheduler/scheduler_config.json", "{\"beta_start\":\"x\"}", "model_corrupt", "scheduler_config");
    fs::remove_file(copy.path("unet/config.json")).unwrap();
    copy.check("missing", Request::Inspect(named("copy")), "model_corrupt", "is missing");
    fs::remove_file(copy.path(m)).unwrap();
    copy.check("no index", Request::Inspect(named("copy")), "model_unsupported", "`model_index.json` is missing");
}

#[track_caller]
fn check_name(resources: &mut ModelResources, name: &str, expected: std::result::Result<&str, &str>) -> Option<Error> {
    let got = resources.catalog.resolve(Some(name));
    assert_eq!(got.as_ref().map(|c| c.name.as_str()).map_err(Error::code), expected, "{name}");
    got.err()
}

#[test]
fn model_names_stay_under_the_roots() {
    let (copy, outside) = (Copy::new(), tempfile::tempdir().unwrap());
    demo_folder(outside.path());
    let root = copy.root.path();
    let mut resources = resources(vec![root.join("absent"), root.to_owned()]);
    fs::create_dir_all(root.join("family")).unwrap();
    fs::rename(root.join("copy"), root.join("family/copy")).unwrap();
    for (name, bytes) in [("a.safetensors", "x"), ("a.ckpt", "x"), ("a.txt", "x")] {
        fs::write(root.join(name), bytes).unwrap();
    }
    check_name(&mut resources, "demo", Ok("demo"));
    check_name(&mut resources, "family/copy", Ok("family/copy"));
    check_name(&mut resources, "family/copy/", Ok("family/copy"));
    check_name(&mut resources, "./family/copy", Ok("family/copy"));
    check_name(&mut resources, root.join("family/copy").to_str().unwrap(), Ok("family/copy"));
    check_name(&mut resources, "family/../family/copy", Err("path_not_allowed"));
    check_name(&mut resources, "../x", Err("path_not_allowed"));
    check_name(&mut resources, "/etc", Err("path_not_allowed"));
    check_name(&mut resources, "/nonexistent/model", Err("path_not_allowed"));
    check_name(&mut resources, outside.path().to_str().unwrap(), Err("path_not_allowed"));
    check_name(&mut resources, "", Err("invalid_parameter"));
    check_name(&mut resources, "  ", Err("invalid_parameter"));
    check_name(&mut resources, "a\0b", Err("invalid_parameter"));
    check_name(&mut resources, "a.safetensors", Err("model_corrupt"));
    check_name(&mut resources, "a.ckpt", Err("unsafe_format"));
    check_name(&mut resources, "a.txt", Err("model_unsupported"));
    check_name(&mut resources, "family", Err("model_unsupported"));
    check_name(&mut resources, "absent", Err("model_not_found"));
    check_name(&mut resources, &"long/".repeat(5000), Err("invalid_parameter"));
    let error = check_name(&mut resources, "family/cpoy", Err("model_not_found")).unwrap();
    assert_eq!(error.hint().as_deref(), Some("did you mean `family/copy`?"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(outside.path(), root.join("link")).unwrap();
        std::os::unix::fs::symlink(root, root.join("loop")).unwrap();
        check_name(&mut resources, "link", Err("path_not_allowed"));
        check_name(&mut resources, "loop/family/copy", Ok("family/copy"));
    }
    let Response::List(list) = ask(Request::List(Nothing {}), &mut resources).unwrap() else { panic!("list") };
    assert_eq!(list.models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["demo", "family/copy"]);
    assert_eq!(list.default, "demo");

    let settings =
        Settings { roots: vec![root.join("family/copy")], default: Some("copy".into()), ..Settings::default() };
    let mut itself = ModelResources::new(&settings);
    assert_eq!(itself.catalog.resolve(None).unwrap().name, "copy");
}

#[test]
fn changed_file_makes_another_checkpoint() {
    let copy = Copy::new();
    let mut resources = copy.resources();
    let first = resources.catalog.resolve(Some("copy")).unwrap();
    assert!(Arc::ptr_eq(&first, &resources.catalog.resolve(Some("copy")).unwrap()));
    change_header(&copy, |header| drop(header.insert("__metadata__".into(), serde_json::json!({"a": "b"}))));
    assert_ne!(first.key, resources.catalog.resolve(Some("copy")).unwrap().key);
}

#[test]
fn demo_is_loaded_listed_pinned_and_unloaded() {
    let mut resources = resources(Vec::new());
    let request: Request = serde_json::from_str(r#"{"load":{"model":"demo"}}"#).unwrap();
    let Response::Load(loaded) = ask(request, &mut resources).unwrap() else { panic!("load") };
    println!("{loaded:?}");
    let parts: Vec<_> = loaded.components.iter().map(|c| (c.name, c.cached)).collect();
    assert_eq!(parts, [("encoder", false), ("unet", false), ("vae", false)]);
    // Stored as f16, which a CPU computing in f32 keeps.
    assert!(loaded.bytes.0 > 33_000_000 && loaded.bytes.0 < 34_500_000, "{}", loaded.bytes);
    let Response::Load(again) = ask(Request::Load(ModelRequest::default()), &mut resources).unwrap() else {
        panic!("load")
    };
    assert!(again.components.iter().all(|c| c.cached), "{again:?}");

    let pin = PinRequest { model: None, revision: None, pin: Some(true) };
    let Response::Pin(pinned) = ask(Request::Pin(pin), &mut resources).unwrap() else { panic!("pin") };
    assert_eq!((pinned.pinned, pinned.bytes), (true, loaded.bytes));
    assert_eq!(resources.unets.evict(Bytes(u64::MAX)), Bytes(0));
    let Response::List(list) = ask(Request::List(Nothing {}), &mut resources).unwrap() else { panic!("list") };
    let demo = &list.models[0];
    assert_eq!((demo.family, demo.dtype, demo.pinned), (Some("sdxl_base"), Some("f16"), true));
    assert_eq!(demo.loaded, ["encoder", "unet", "vae"]);
    ask(Request::Pin(PinRequest { model: None, revision: None, pin: Some(false) }), &mut resources).unwrap();

    let held = resources.unets.acquire(
        &Checkpoint::demo().unwrap(),
        &placement(Dtype::F32, Quantization::None),
        &Context::detached(),
    );
    let weak = Arc::downgrade(&held.unwrap());
    let Response::Unload(freed) = ask(Request::Unload(named("demo")), &mut resources).unwrap() else {
        panic!("unload")
    };
    assert_eq!(freed.models, ["demo"]);
    assert!(freed.freed >= loaded.bytes);
    assert!(weak.upgrade().is_none(), "the network outlived its unloading");
    assert!(resources.resident().is_empty());
}

#[test]
fn inspect_reports_the_files() {
    let Response::Inspect(facts) = ask(Request::Inspect(ModelRequest::default()), &mut resources(Vec::new())).unwrap()
    else {
        panic!("inspect")
    };
    assert_eq!((facts.model.as_str(), facts.family, facts.default_width), ("demo", "sdxl_base", 256));
    let names: Vec<_> = facts.components.iter().map(|c| (c.name, c.tensors, c.dtypes.clone())).collect();
    let f16 = vec!["f16"];
    assert_eq!(
        names,
        [
            ("text_encoder", 52, f16.clone()),
            ("text_encoder_2", 53, f16.clone()),
            ("unet", 410, f16.clone()),
            ("vae", 188, f16)
        ]
    );
    assert_eq!(facts.scheduler.class_name.as_deref(), Some("EulerDiscreteScheduler"));
    let published = vec![sdxl_worker::layers::Resident {
        kind: "unet",
        name: "demo".into(),
        bytes: Bytes(1),
        pinned: true,
        used_ms: None,
        form: None,
        over: None,
    }];
    let mut desk = ModelResources::new(&Settings::default());
    let scope = RequestScope::Query { residents: published };
    let list = ModelInstructor.instruct(Request::List(Nothing {}), scope.with(&mut desk), &Context::detached());
    let Ok(Response::List(list)) = list else { panic!("list") };
    assert_eq!((list.models[0].loaded.clone(), list.models[0].pinned), (vec!["unet"], true));
}

#[test]
fn f32_weights_become_the_compute_dtype() {
    let mut resources = resources(Vec::new());
    for (compute, expected) in [(Dtype::F32, 2), (Dtype::Bf16, 2), (Dtype::F16, 2)] {
        let Response::Load(loaded) = load(&mut resources, placement(compute, Quantization::None)) else {
            panic!("load")
        };
        assert!(loaded.components[1].bytes.0 / 8_800_000 == expected, "{compute:?}: {loaded:?}");
    }
}

#[test]
fn quantized_unet_is_smaller_and_cached_separately() {
    let mut resources = resources(Vec::new());
    let mut parts = |quantization| {
        let Response::Load(loaded) = load(&mut resources, placement(Dtype::F32, quantization)) else { panic!("load") };
        loaded.components
    };
    let (wide, narrow) = (parts(Quantization::None), parts(Quantization::Int8));
    let cached = |components: &[LoadedComponent]| components.iter().map(|part| part.cached).collect::<Vec<_>>();
    assert_eq!((cached(&wide), cached(&narrow)), (vec![false; 3], vec![true, false, true]));
    let share = narrow[1].bytes.0 as f64 / wide[1].bytes.0 as f64;
    println!("the quantised UNet takes {share:.3} of the one in f16");
    assert!((0.5..0.7).contains(&share), "{share}");
    let unet = Checkpoint::demo().unwrap().open(Part::Unet, &Context::detached()).unwrap();
    let quantized = unet.tensors().filter(|(name, stored)| {
        let layer = name.strip_suffix(".weight");
        stored.shape.len() > 1 && layer.is_some_and(|layer| Unet::bears_int8(layer, &stored.shape))
    });
    let elements = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let expected: u64 = quantized.map(|(_, one)| one.range.end - one.range.start - elements(&one.shape)).sum();
    let saved = wide[1].bytes.saturating_sub(narrow[1].bytes).0;
    assert!(saved <= expected && expected - saved < expected / 4, "{saved} saved, {expected} expected");
    assert_eq!(cached(&parts(Quantization::None)), [true; 3]);
}

#[test]
fn loading_reports_progress_and_can_be_cancelled() {
    let (cancel, seen) = (CancelToken::default(), Arc::new(Mutex::new(Vec::new())));
    let (sink, stop) = (Arc::clone(&seen), cancel.clone());
    let report = move |progress: Progress| {
        if let Progress::ModelLoading { component, bytes_done, bytes_total } = progress {
            sink.lock().unwrap().push((component, bytes_done, bytes_total));
            if component == "text_encoder_2" {
                stop.cancel();
            }
        }
    };
    let ctx = Context::new("r".into(), cancel, None, None, Box::new(report));
    let mut resources = resources(Vec::new());
    let request = Request::Load(ModelRequest::default());
    let error = ModelInstructor.instruct(request, on_cpu().with(&mut resources), &ctx).unwrap_err();
    assert_eq!(error.code(), "cancelled");
    let seen = seen.lock().unwrap();
    // How often depends on the machine; progress grows, and nothing follows the cancellation.
    let mut components: Vec<_> = seen.iter().map(|(component, ..)| *component).collect();
    components.dedup();
    assert_eq!(components, ["text_encoder", "text_encoder_2"]);
    assert!(seen.is_sorted_by(|(a, before, _), (b, after, _)| a != b || before < after), "{seen:?}");
    assert!(seen.iter().all(|(_, done, total)| done <= total && *total > Bytes(3_000_000)), "{seen:?}");
    assert_eq!(seen.iter().filter(|(component, ..)| *component == "text_encoder_2").count(), 1, "{seen:?}");
}

fn keys(count: u64) -> Vec<ShelfKey> {
    let checkpoint = Checkpoint::demo().unwrap().key;
    (0..count)
        .map(|n| ShelfKey {
            checkpoint,
            over: None,
            form: ResidentForm { dtype: Dtype::F32, quantization: Quantization::None, offloaded: false },
            device: format!("cuda:{n}"),
        })
        .collect()
}

fn names<T>(shelf: &Shelf<T>) -> Vec<String> {
    shelf.resident().into_iter().map(|r| r.name).collect()
}

#[test]
fn cache_evicts_the_least_recently_used() {
    let (mut shelf, keys) = (Shelf::new("test", &Budget::new(Bytes(100))), keys(5));
    for (key, name) in keys.iter().zip(["a", "b", "c"]) {
        shelf.insert(key.clone(), name, Bytes(40), ());
    }
    assert_eq!(names(&shelf), ["b", "c"]);
    assert!(shelf.get(&keys[0]).is_none() && shelf.get(&keys[1]).is_some());
    shelf.insert(keys[3].clone(), "d", Bytes(40), ());
    assert_eq!(names(&shelf), ["b", "d"]);
    // An entry larger than the capacity stays, alone.
    shelf.insert(keys[4].clone(), "e", Bytes(400), ());
    assert_eq!((names(&shelf), shelf.bytes()), (vec!["e".to_owned()], Bytes(400)));
    shelf.insert(keys[0].clone(), "a", Bytes(40), ());
    assert_eq!(names(&shelf), ["a"]);
    shelf.insert(keys[0].clone(), "a again", Bytes(50), ());
    assert_eq!((names(&shelf), shelf.bytes()), (vec!["a again".to_owned()], Bytes(50)));
    assert_eq!(shelf.evict(Bytes(1)), Bytes(50));
    assert_eq!(shelf.evict(Bytes(1)), Bytes(0));
}

#[test]
fn caches_share_a_budget_and_evict_in_order() {
    let budget = Budget::new(Bytes(100));
    let (mut unets, mut vaes) = (Shelf::new("unet", &budget), Shelf::new("vae", &budget));
    let mut encoders = Shelf::new("encoder", &budget);
    let keys = keys(4);
    budget.begin(Bytes(100), None);
    encoders.insert(keys[0].clone(), "e", Bytes(30), ());
    unets.insert(keys[0].clone(), "u", Bytes(60), ());
    // More than the capacity, all used by one request.
    vaes.insert(keys[0].clone(), "v", Bytes(20), ());
    assert_eq!(budget.bytes(), Bytes(110));
    budget.begin(Bytes(100), None);
    assert_eq!(budget.evictable(Reach::Others), Bytes(110));
    // Entries of the earlier request are evicted: text encoders, then the VAE, then the UNet.
    vaes.insert(keys[1].clone(), "w", Bytes(10), ());
    assert_eq!(
        (names(&encoders), names(&vaes), names(&unets)),
        (vec![], vec!["v".into(), "w".into()], vec!["u".into()])
    );
    vaes.insert(keys[2].clone(), "x", Bytes(25), ());
    assert_eq!((names(&vaes), names(&unets)), (vec!["w".into(), "x".into()], vec!["u".into()]));
    // Entries that are still referenced free nothing, and those of the running request stay.
    let held = unets.get(&keys[0]);
    assert_eq!(budget.evict(Bytes(1000), Reach::Idle), Bytes(35));
    drop(held);
    budget.begin(Bytes(100), None);
    assert_eq!(budget.evict(Bytes(1000), Reach::Others), Bytes(60));
}

#[test]
fn cache_never_evicts_pinned_entries() {
    let (mut shelf, keys) = (Shelf::new("test", &Budget::new(Bytes(100))), keys(2));
    shelf.insert(keys[0].clone(), "a", Bytes(90), ());
    shelf.pin(keys[0].checkpoint, true);
    shelf.insert(keys[1].clone(), "b", Bytes(90), ());
    assert_eq!(names(&shelf), ["a", "b"]);
    assert_eq!((shelf.evict(Bytes(1000)), names(&shelf)), (Bytes(90), vec!["a".to_owned()]));
    assert_eq!(shelf.remove(Some(keys[0].checkpoint)), Bytes(90));
}

#[test]
fn every_family_is_identified_by_its_shapes() {
    use sdxl_worker::model::checkpoint::families::Family;
    for (name, family) in FAMILIES.iter() {
        assert_eq!(name, family.name);
        let depths = family.depths.unwrap_or_default();
        assert_eq!(Family::detect(family.first_encoder, family.channels, depths), Some(family));
        assert!(family.pipelines.iter().all(|class| Family::knows(class)));
    }
}
