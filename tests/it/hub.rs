//! The hub: fetching repositories from a server on this machine, and using the cache without a network.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod concurrency;

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::conditioning::demo_folder;
use crate::hub_cache::offline_resources;
use crate::hub_server::{Faults, Hub, sha256};
use crate::single_file::single;
use crate::wire::{Worker, code};

pub(super) const FIRST: &str = "1111111111111111111111111111111111111111";
pub(super) const SECOND: &str = "2222222222222222222222222222222222222222";
const THIRD: &str = "3333333333333333333333333333333333333333";
pub(super) const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// The files of the demonstration model.
pub(super) fn demo() -> Vec<(String, Vec<u8>)> {
    let place = tempfile::tempdir().unwrap();
    demo_folder(place.path());
    let mut files = Vec::new();
    for part in ["", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"] {
        for entry in fs::read_dir(place.path().join(part)).unwrap().map(Result::unwrap) {
            if entry.path().is_file() {
                let own = entry.file_name().into_string().unwrap();
                let name = if part.is_empty() { own } else { format!("{part}/{own}") };
                files.push((name, fs::read(entry.path()).unwrap()));
            }
        }
    }
    files.sort();
    files
}

pub(super) fn bytes_of(name: &str) -> Vec<u8> {
    demo().into_iter().find(|(known, _)| known == name).unwrap().1
}

/// A hub with the demonstration model as `owner/demo`, and an empty cache.
struct Place {
    hub: Hub,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let hub = Hub::start();
        hub.commit("owner/demo", &["main"], FIRST, demo());
        Self { hub, folder: tempfile::tempdir().unwrap() }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn repository(&self) -> PathBuf {
        self.cache().join("models--owner--demo")
    }

    fn snapshot(&self, name: &str) -> PathBuf {
        self.repository().join("snapshots").join(FIRST).join(name)
    }

    fn blob(&self, name: &str) -> PathBuf {
        self.repository().join("blobs").join(sha256(&bytes_of(name)))
    }

    fn worker(&self, download: bool) -> Worker {
        let token = self.folder.path().join("token");
        fs::write(&token, "hf_secret\n").unwrap();
        let hub = json!({ "download": download, "endpoint": self.hub.endpoint(), "cache": self.cache(),
                          "token_file": token });
        let config = json!({ "workers": { "instructors": {
            "model": { "hub": hub }, "postprocessing": { "metadata": false }, "device": { "device": "cpu" } } } });
        let path = self.folder.path().join(format!("config-{download}.json"));
        fs::write(&path, config.to_string()).unwrap();
        Worker::start(&["--config", path.to_str().unwrap()])
    }
}

fn model(id: &str, operation: &str, data: &Value) -> Value {
    json!({ "request_id": id, "worker_type": "model", "operation": operation, "data": data })
}

fn ask(worker: &mut Worker, operation: &str, data: &Value) -> Value {
    worker.send(&model(operation, operation, data));
    worker.answer(operation)
}

fn fetch(worker: &mut Worker, data: &Value) -> Value {
    ask(worker, "fetch", data)
}

fn fetched(worker: &mut Worker, data: &Value) -> Value {
    let answer = fetch(worker, data);
    assert_eq!(answer["success"], true, "{answer}");
    answer["data"].clone()
}

/// The code and hint of a fetch that fails.
fn refused(worker: &mut Worker, data: &Value) -> (String, String) {
    let answer = fetch(worker, data);
    let hint = answer["error"]["hint"].as_str().unwrap_or_default().to_owned();
    (code(&answer).to_owned(), format!("{hint} {}", answer["error"]["message"].as_str().unwrap()))
}

/// An image of a model as bytes, and the echoed parameters.
fn image(worker: &mut Worker, model: &str, revision: Option<&str>) -> (Vec<u8>, Value) {
    let mut data = json!({ "prompt": "a hill", "steps": 2, "seed": 7, "model": model });
    if let Some(revision) = revision {
        data["revision"] = json!(revision);
    }
    worker.send(&json!({ "request_id": "image", "worker_type": "inference", "operation": "generate", "data": data }));
    let answer = worker.answer("image");
    assert_eq!(answer["success"], true, "{answer}");
    let path = answer["data"]["images"][0]["path"].as_str().unwrap();
    (fs::read(worker.folder.path().join(path)).unwrap(), answer["data"]["parameters"].clone())
}

#[test]
fn fetched_repository_is_used_offline() {
    let place = Place::new();
    let mut files = demo();
    for decoy in [
        "README.md",
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ] {
        files.push((decoy.to_owned(), b"decoy".to_vec()));
    }
    place.hub.commit("owner/demo", &["main"], FIRST, files);
    let mut online = place.worker(true);
    online.send(&json!({ "request_id": "fetch", "worker_type": "model", "operation": "fetch", "events": {},
                         "data": { "model": "owner/demo" } }));
    let mut done = 0;
    let answer = loop {
        let line = online.next().unwrap();
        if line["type"] != "event" {
            break line;
        }
        if line["event"] == "fetching" {
            let now = line["bytes_done"].as_u64().unwrap();
            assert!(now >= done && now <= line["bytes_total"].as_u64().unwrap(), "{line}");
            done = now;
        }
    };
    let all: usize = demo().iter().map(|(_, bytes)| bytes.len()).sum();
    let data = &answer["data"];
    assert_eq!((&data["model"], &data["revision"]), (&json!("owner/demo"), &json!(FIRST)));
    assert_eq!((data["bytes"].as_u64(), data["downloaded"].as_u64()), (Some(all as u64), Some(all as u64)));
    let names: Vec<&str> = data["files"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
    assert_eq!(names, demo().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
    let unet = data["files"].as_array().unwrap().iter().find(|file| file["name"] == UNET).unwrap();
    assert_eq!(unet["sha256"], sha256(&bytes_of(UNET)));
    assert!(done > 0);
    let seen = place.hub.seen();
    for request in &seen {
        let own = request.host.starts_with("127.0.0.1");
        let token = request.authorization.as_deref();
        assert_eq!(token, own.then_some("Bearer hf_secret"), "the token goes to the hub alone: {request:?}");
    }
    assert!(seen.iter().any(|request| request.host.starts_with("localhost")), "{seen:?}");
    let again = fetched(&mut online, &json!({ "model": "owner/demo" }));
    assert_eq!(again["downloaded"], 0);
    assert_eq!(place.hub.seen().len(), 1, "a cached file is not requested again");
    drop(online);

    let mut offline = place.worker(false);
    assert_eq!(fetched(&mut offline, &json!({ "model": "owner/demo" }))["downloaded"], 0);
    let (from_hub, parameters) = image(&mut offline, "owner/demo", None);
    assert_eq!(from_hub, image(&mut offline, "demo", None).0);
    assert_eq!((&parameters["model"], &parameters["revision"]), (&json!("owner/demo"), &json!(FIRST)));
    assert_eq!(from_hub, image(&mut offline, "owner/demo", Some(FIRST)).0);
    let list = ask(&mut offline, "list", &json!({}));
    let listed: Vec<&Value> = list["data"]["models"].as_array().unwrap().iter().collect();
    assert_eq!(listed.iter().map(|m| m["name"].as_str().unwrap()).collect::<Vec<_>>(), ["demo", "owner/demo"]);
    assert_eq!((&listed[1]["revision"], &listed[1]["family"]), (&json!(FIRST), &listed[0]["family"]));
    let inspected = ask(&mut offline, "inspect", &json!({ "model": "owner/demo", "revision": "main" }));
    assert_eq!(inspected["data"]["revision"], FIRST);
    assert_eq!(place.hub.seen().len(), 0);
}

#[test]
fn revision_is_a_branch_a_tag_or_a_commit() {
    let place = Place::new();
    let mut other = demo();
    other.iter_mut().find(|(name, _)| name == "model_index.json").unwrap().1.push(b'\n');
    place.hub.commit("owner/demo", &["v1", "refs/pr/1"], SECOND, other);
    let mut worker = place.worker(true);
    let at = |data: Value, worker: &mut Worker| fetched(worker, &data)["revision"].clone();
    assert_eq!(at(json!({ "model": "owner/demo" }), &mut worker), FIRST);
    assert_eq!(at(json!({ "model": "owner/demo@v1" }), &mut worker), SECOND);
    assert_eq!(at(json!({ "model": "owner/demo", "revision": "refs/pr/1" }), &mut worker), SECOND);
    assert_eq!(at(json!({ "model": "owner/demo", "revision": SECOND }), &mut worker), SECOND);
    let inspect = |worker: &mut Worker, data: Value| ask(worker, "inspect", &data)["data"]["revision"].clone();
    assert_eq!(inspect(&mut worker, json!({ "model": "owner/demo" })), FIRST);
    assert_eq!(inspect(&mut worker, json!({ "model": "owner/demo@v1" })), SECOND);
    assert_eq!(inspect(&mut worker, json!({ "model": "owner/demo", "revision": "refs/pr/1" })), SECOND);
    assert_eq!(inspect(&mut worker, json!({ "model": format!("owner/demo@{SECOND}") })), SECOND);
    for (options, wanted) in [
        (json!({ "model": "owner/demo", "revision": "../main" }), "path_not_allowed"),
        (json!({ "model": "owner/../demo" }), "path_not_allowed"),
        (json!({ "model": "owner/demo@.." }), "path_not_allowed"),
        (json!({ "model": "owner/demo@%2F.." }), "path_not_allowed"),
        (json!({ "model": "owner/demo@" }), "invalid_parameter"),
        (json!({ "model": "owner/demo", "revision": "a b" }), "invalid_parameter"),
        (json!({ "model": "owner/demo", "revision": "/etc" }), "invalid_parameter"),
        (json!({ "model": "owner/demo", "revision": "x".repeat(200) }), "invalid_parameter"),
        (json!({ "model": "owner/demo@v1", "revision": "main" }), "invalid_parameter"),
        (json!({ "model": "demo", "revision": "main" }), "invalid_parameter"),
        (json!({ "model": "demo" }), "invalid_parameter"),
        (json!({ "model": "/owner/demo" }), "invalid_parameter"),
        (json!({ "model": "owner--x/demo" }), "invalid_parameter"),
        (json!({ "model": "owner/demo", "files": "../x" }), "path_not_allowed"),
        (json!({ "model": "owner/demo", "files": [] }), "invalid_parameter"),
        (json!({ "model": "owner/demo", "revision": "absent" }), "model_not_found"),
        (json!({ "model": "owner/absent" }), "model_not_found"),
    ] {
        assert_eq!(refused(&mut worker, &options).0, wanted, "{options}");
    }
    assert_eq!(code(&ask(&mut worker, "inspect", &json!({ "revision": "main" }))), "invalid_parameter");
}

#[test]
fn file_with_another_hash_is_discarded() {
    let place = Place::new();
    let mut worker = place.worker(true);
    let right = sha256(&bytes_of(UNET));
    let options = |pin: Value| json!({ "model": "owner/demo", "files": UNET, "sha256": pin });
    let (wrong, message) = refused(&mut worker, &options(json!("0".repeat(64))));
    assert_eq!(wrong, "model_corrupt");
    assert!(message.contains(&right), "{message}");
    assert!(!place.snapshot(UNET).exists() && !place.blob(UNET).exists(), "it is not kept");
    assert_eq!(fetched(&mut worker, &options(json!(right.to_uppercase())))["files"][0]["sha256"], right);
    assert_eq!(refused(&mut worker, &options(json!("0".repeat(64)))).0, "model_corrupt", "of what is in the cache too");
    assert!(place.snapshot(UNET).exists(), "what is in the cache is others' as well");
    let by_file = |name: &str, hash: &str| json!({ "model": "owner/demo", "sha256": { name: hash } });
    assert_eq!(refused(&mut worker, &by_file(UNET, "12")).0, "invalid_parameter");
    assert_eq!(refused(&mut worker, &by_file("unet/other", &right)).0, "invalid_parameter");
    assert_eq!(refused(&mut worker, &json!({ "model": "owner/demo", "sha256": right })).0, "invalid_parameter");
    assert_eq!(refused(&mut worker, &json!({ "model": "owner/demo", "sha256": 7 })).0, "invalid_parameter");
    assert!(fetched(&mut worker, &by_file(UNET, &right))["downloaded"].as_u64().unwrap() > 0);
}

#[test]
fn fetch_selects_by_name_or_pattern_and_never_pickles() {
    let place = Place::new();
    let file = |name: &str| (name.to_owned(), name.as_bytes().to_vec());
    let many = ["config.json", "a.safetensors", "b.safetensors", "c d.safetensors", "old.ckpt", "note.md"];
    place.hub.commit("owner/many", &["main"], THIRD, many.map(file).to_vec());
    place.hub.commit("owner/old", &["main"], SECOND, ["config.json", "old.bin"].map(file).to_vec());
    let mut worker = place.worker(true);
    let names = |worker: &mut Worker, files: Value| -> Vec<String> {
        let data = fetched(worker, &json!({ "model": "owner/many", "files": files }));
        data["files"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&mut worker, json!(["?.safetensors"])), ["a.safetensors", "b.safetensors"]);
    assert_eq!(names(&mut worker, json!(["c*", "config.json"])), ["c d.safetensors", "config.json"]);
    assert_eq!(names(&mut worker, json!("*")).len(), 4);
    let by_path = fetched(&mut worker, &json!({ "model": "owner/many/a.safetensors" }));
    assert_eq!(by_path["files"].as_array().unwrap().len(), 1);
    let files = ["unet/config.json", UNET].map(str::to_owned);
    let folder = fetched(&mut worker, &json!({ "model": "owner/demo/unet" }));
    assert_eq!(folder["files"].as_array().unwrap().iter().map(|f| f["name"].clone()).collect::<Vec<_>>(), files);
    let (wrong, message) = refused(&mut worker, &json!({ "model": "owner/many" }));
    assert_eq!(wrong, "invalid_parameter");
    assert!(message.contains("`b.safetensors`"), "{message}");
    let of = |worker: &mut Worker, files: &str| refused(worker, &json!({ "model": "owner/many", "files": files }));
    assert_eq!(of(&mut worker, "old.ckpt").0, "unsafe_format");
    assert_eq!(of(&mut worker, "note.md").0, "model_unsupported");
    assert_eq!(of(&mut worker, "*.ckpt").0, "invalid_parameter");
    assert!(of(&mut worker, "a.safetensor").1.contains("did you mean `a.safetensors`?"));
    assert_eq!(refused(&mut worker, &json!({ "model": "owner/old" })).0, "unsafe_format");
}

#[test]
fn missing_repository_without_downloads_is_offline() {
    let place = Place::new();
    let mut worker = place.worker(false);
    let (wrong, message) = refused(&mut worker, &json!({ "model": "owner/demo" }));
    assert_eq!(wrong, "offline");
    assert!(message.contains("hub.download"), "{message}");
    for operation in ["inspect", "load"] {
        assert_eq!(code(&ask(&mut worker, operation, &json!({ "model": "owner/demo" }))), "offline");
    }
    worker.send(&json!({ "request_id": "image", "prompt": "a hill", "model": "owner/demo" }));
    assert_eq!(code(&worker.answer("image")), "offline");
    let options = json!({ "model": "owner/net", "image": "data:image/png;base64," });
    worker.send(&json!({ "request_id": "control", "prompt": "a hill", "controlnet": options }));
    assert_eq!(code(&worker.answer("control")), "offline");
    assert_eq!(code(&ask(&mut worker, "inspect", &json!({ "model": "nobody" }))), "model_not_found");
    assert_eq!(place.hub.seen().len(), 0, "no request leaves");
    let mut online = place.worker(true);
    let answer = ask(&mut online, "inspect", &json!({ "model": "owner/demo" }));
    assert_eq!(code(&answer), "model_not_found");
    assert!(answer["error"]["hint"].as_str().unwrap().contains("`model.fetch`"), "{answer}");
}

#[test]
fn interrupted_download_resumes() {
    let place = Place::new();
    let size = bytes_of(UNET).len();
    let half = size / 2;
    let most = size - 1;
    assert!(most > 1 << 20, "{most}");
    for (direct, whole) in [(false, false), (true, false), (false, true)] {
        let _ = fs::remove_dir_all(place.cache());
        place.hub.fail(Faults { cut: Some((half, 1)), direct, whole, ..Faults::default() });
        let mut worker = place.worker(true);
        let data = fetched(&mut worker, &json!({ "model": "owner/demo", "files": UNET }));
        assert_eq!(data["files"][0]["sha256"], sha256(&bytes_of(UNET)), "{direct} {whole}");
        let ranges: Vec<String> = place.hub.seen().into_iter().filter_map(|request| request.range).collect();
        assert!(ranges.contains(&format!("bytes={half}-")), "{ranges:?}");
        assert_eq!(fs::read(place.snapshot(UNET)).unwrap(), bytes_of(UNET));
    }
    // Repeating the same beginning is no progress.
    let _ = fs::remove_dir_all(place.cache());
    place.hub.fail(Faults { cut: Some((most, 99)), whole: true, ..Faults::default() });
    let mut worker = place.worker(true);
    assert_eq!(refused(&mut worker, &json!({ "model": "owner/demo", "files": UNET })).0, "download_failed");
    // A partial file of another process, with wrong bytes.
    for (begun, downloaded) in
        [(bytes_of(UNET)[..half].to_vec(), size), (vec![7; half], size), (vec![7; size + 9], size)]
    {
        let _ = fs::remove_dir_all(place.cache());
        place.hub.fail(Faults::default());
        let part = place.blob(UNET).with_added_extension("incomplete");
        fs::create_dir_all(part.parent().unwrap()).unwrap();
        fs::write(&part, begun).unwrap();
        let data = fetched(&mut place.worker(true), &json!({ "model": "owner/demo", "files": UNET }));
        assert_eq!(data["downloaded"].as_u64(), Some(downloaded as u64));
        assert_eq!(fs::read(place.snapshot(UNET)).unwrap(), bytes_of(UNET));
        assert!(!part.exists());
    }
}

#[test]
fn failing_hub_is_an_error_and_writes_nothing_elsewhere() {
    let place = Place::new();
    let mut worker = place.worker(true);
    let status = |part: &str, status: u16| Faults { status: Some((part.to_owned(), status)), ..Faults::default() };
    let text = |text: &str| Some(text.to_owned());
    for (faults, wanted) in [
        (status("/api/", 500), "download_failed"),
        (status("/store/", 503), "download_failed"),
        (status("/api/", 401), "model_not_found"),
        (status("/resolve/", 403), "model_not_found"),
        (status("/api/", 418), "download_failed"),
        (Faults { cut: Some((1000, 99)), ..Faults::default() }, "download_failed"),
        (Faults { altered: true, ..Faults::default() }, "download_failed"),
        (Faults { etag: text("../../../../evil"), ..Faults::default() }, "download_failed"),
        (Faults { etag: text("/tmp/evil"), ..Faults::default() }, "download_failed"),
        (Faults { etag: text(""), ..Faults::default() }, "download_failed"),
        (Faults { commit: text(SECOND), ..Faults::default() }, "download_failed"),
    ] {
        place.hub.fail(faults.clone());
        let (code, message) = refused(&mut worker, &json!({ "model": "owner/demo", "files": UNET }));
        assert_eq!(code, wanted, "{faults:?}: {message}");
        assert!(!message.contains("hf_secret"), "{message}");
        assert!(!place.snapshot(UNET).exists() && !place.repository().join("refs/main").exists(), "{faults:?}");
    }
    place.hub.fail(Faults::default());
    for (repository, name) in
        [("owner/up", "../evil.json"), ("owner/abs", "/tmp/evil.json"), ("owner/dot", "a/./b.json")]
    {
        place.hub.commit(repository, &["main"], SECOND, vec![(name.to_owned(), Vec::new())]);
        assert_eq!(refused(&mut worker, &json!({ "model": repository, "files": "*" })).0, "download_failed");
    }
    place.hub.commit("owner/odd", &["main"], "main", demo());
    assert_eq!(refused(&mut worker, &json!({ "model": "owner/odd" })).0, "download_failed");
    let mut kept: Vec<_> = fs::read_dir(place.cache()).unwrap().map(|e| e.unwrap().file_name()).collect();
    kept.sort();
    assert_eq!(kept, [".locks", "models--owner--demo"]);
    assert!(fetched(&mut worker, &json!({ "model": "owner/demo" }))["bytes"].as_u64() > Some(0));
}

#[test]
fn single_file_of_a_repository_is_a_model() {
    let place = Place::new();
    let folder = tempfile::tempdir().unwrap();
    demo_folder(folder.path());
    let file = folder.path().join("big.safetensors");
    single(folder.path(), 1).write(&file);
    place.hub.commit("owner/big", &["main"], SECOND, vec![("big.safetensors".to_owned(), fs::read(file).unwrap())]);
    let mut worker = place.worker(true);
    let own = image(&mut worker, "demo", None).0;
    let (drawn, parameters) = image(&mut worker, "owner/big/big.safetensors", None);
    assert_eq!(drawn, own);
    assert_eq!((&parameters["model"], &parameters["revision"]), (&json!("owner/big/big.safetensors"), &json!(SECOND)));
    assert_eq!(image(&mut worker, "owner/big/big", Some(SECOND)).0, own);
    // A repository of one file stands for that file.
    fs::remove_dir_all(place.cache()).unwrap();
    let (drawn, parameters) = image(&mut worker, "owner/big", None);
    assert_eq!((drawn, &parameters["model"]), (own.clone(), &json!("owner/big")));
    let mut offline = place.worker(false);
    let data = fetched(&mut offline, &json!({ "model": "owner/big" }));
    assert_eq!((&data["downloaded"], &data["revision"]), (&json!(0), &json!(SECOND)));
    let name = data["model"].as_str().unwrap();
    assert_eq!(name, "owner/big/big.safetensors");
    for name in ["owner/big", name] {
        assert_eq!(image(&mut offline, name, None).0, own, "{name}");
    }
    let list = ask(&mut offline, "list", &json!({}));
    let names = list["data"]["models"].as_array().unwrap().iter().map(|model| model["name"].clone());
    assert_eq!(names.collect::<Vec<_>>(), ["demo", "owner/big"]);
    // As a component, too.
    let resources = offline_resources(&place.cache());
    assert!(resources.catalog.component_file("owner/big", "loras").is_ok());
}
