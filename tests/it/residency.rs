//! Memory: the fallbacks when it is short, and the accuracy of what is reported.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and tells what it measured")]

use std::fs;
use std::path::Path;

use base64::Engine as _;
use serde_json::{Value, json};

use crate::conditioning::demo_folder;
use crate::drawing;
use crate::wire::{Worker, code};

const MIB: u64 = 1 << 20;
/// The variation of a process's memory from one start to the next.
const SLACK: u64 = 3 * MIB / 2;
/// The most that threads and caches keep after a first image, besides networks.
const KEPT: u64 = 40 * MIB;
/// Enough passes that the UNet's feature maps, not the decoder's, are the peak.
const PARTS: usize = 16;

/// A worker with an optional memory limit and copies of the demonstration model in a folder.
struct Limited {
    worker: Worker,
    _config: tempfile::TempDir,
    requests: usize,
}

impl Limited {
    fn new(limit: Option<u64>, models: Option<&Path>) -> Self {
        let config = tempfile::tempdir().unwrap();
        let file = config.path().join("config.json");
        let model =
            models.map_or(json!({ "cache_size": "1GB" }), |models| json!({ "cache_size": "1GB", "roots": [models] }));
        let instructors = json!({ "device": { "device": "cpu", "host_memory": limit }, "model": model });
        fs::write(&file, json!({ "workers": { "instructors": instructors } }).to_string()).unwrap();
        Self { worker: Worker::start(&["--config", file.to_str().unwrap()]), _config: config, requests: 0 }
    }

    fn send(&mut self, worker_type: &str, operation: &str, data: &Value) -> Value {
        self.requests += 1;
        let id = format!("m-{}", self.requests);
        let line = json!({ "request_id": id, "worker_type": worker_type, "operation": operation, "data": data });
        self.worker.send(&line);
        self.worker.answer(&id)
    }

    fn ask(&mut self, worker_type: &str, operation: &str, data: &Value) -> Value {
        let answer = self.send(worker_type, operation, data);
        assert_eq!(answer["success"], true, "{answer}");
        answer["data"].clone()
    }

    fn draw(&mut self, data: &Value) -> Value {
        self.ask("inference", "generate", data)
    }

    fn estimate(&mut self, data: &Value) -> Value {
        self.ask("communication", "estimate", data)
    }

    fn process(&mut self, key: &str) -> u64 {
        self.ask("device", "memory", &json!({}))["process"][key].as_u64().unwrap()
    }

    /// The bytes that count towards its limit.
    fn taken(&mut self) -> u64 {
        self.process("anonymous") - self.process("kept")
    }
}

fn request(side: usize, parts: usize) -> Value {
    let prompt = vec!["a hill"; parts].join(" AND ");
    json!({ "prompt": prompt, "steps": 1, "width": side, "height": side, "seed": 7, "output": { "return": "base64" } })
}

fn with(mut request: Value, more: &Value) -> Value {
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

fn image(answer: &Value) -> &str {
    answer["images"][0]["base64"].as_str().unwrap()
}

/// True if two images are equal, except for values so close to a rounding boundary that either byte is right.
fn alike(ours: &Value, reference: &Value) -> bool {
    let pixels = |answer: &Value| {
        let file = base64::engine::general_purpose::STANDARD.decode(image(answer)).unwrap();
        image::load_from_memory(&file).unwrap().into_rgb8().into_raw()
    };
    let (ours, reference) = (pixels(ours), pixels(reference));
    let apart = ours.iter().zip(&reference).filter(|(a, b)| a != b).count();
    let most = ours.iter().zip(&reference).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
    println!("{apart} of {} bytes differ, by {most} at most", ours.len());
    ours.len() == reference.len() && most <= 1 && apart * 1000 < ours.len()
}

fn fallbacks(memory: &Value) -> Vec<&str> {
    memory["rungs"].as_array().unwrap().iter().map(|fallback| fallback.as_str().unwrap()).collect()
}

#[test]
fn every_memory_mode_makes_the_same_image() {
    let folder = tempfile::tempdir().unwrap();
    demo_folder(&folder.path().join("copy"));
    let mut free = Limited::new(None, Some(folder.path()));
    let plain = free.draw(&request(192, 1));
    let memory = &plain["memory"];
    assert_eq!(*memory, json!({ "decode": "whole", "slice": false, "offload": "none", "rungs": [] }));
    for (more, way) in [
        (json!({ "decode": "strips" }), json!({ "decode": "strips", "slice": false, "offload": "none", "rungs": [] })),
        (
            json!({ "offload": "text_encoders" }),
            json!({ "decode": "whole", "slice": false, "offload": "text_encoders", "rungs": [] }),
        ),
        (
            json!({ "offload": "sequential" }),
            json!({ "decode": "whole", "slice": false, "offload": "sequential", "rungs": [] }),
        ),
    ] {
        let made = free.draw(&with(request(192, 1), &more));
        assert_eq!(made["memory"], way);
        assert!(alike(&made, &plain), "{more} makes another image");
        assert!(more["offload"].is_null() || image(&made) == image(&plain), "{more} makes another image");
        let (key, value) = more.as_object().unwrap().iter().next().unwrap();
        assert_eq!(made["parameters"][key], *value);
        // The files of models other than the embedded one are mapped.
        let of_disk = free.draw(&with(
            with(request(192, 1), &more),
            &json!({ "model": "copy", "output": { "return": "base64", "metadata": false } }),
        ));
        let bare = free.draw(&with(request(192, 1), &json!({ "output": { "return": "base64", "metadata": false } })));
        assert!(alike(&of_disk, &bare), "{more} makes another image of a model on disk");
    }
    let encoders = |status: &Value| status["residents"].as_array().unwrap().iter().any(|one| one["kind"] == "encoder");
    let kept = free.ask("communication", "status", &json!({}));
    assert!(!encoders(&kept), "text encoders that leave are there: {kept}");
}

#[test]
fn sliced_guidance_differs_by_rounding_only() {
    for parts in [1, 3] {
        let request = |slice| sdxl_worker::inference::interface::GenerateRequest {
            slice: Some(slice),
            steps: Some(3),
            ..serde_json::from_value(request(128, parts)).unwrap()
        };
        let mut worker = drawing::Worker::new();
        let (together, apart) = (worker.draw(&request(false)), worker.draw(&request(true)));
        let distance = drawing::distance(&apart[0].0, &together[0].0);
        println!("{parts} parts: {distance:.1e} of the standard deviation");
        assert!(distance < 1e-5, "{distance}");
    }
}

#[test]
fn fallbacks_are_taken_as_far_as_the_limit_requires() {
    let wanted = request(512, PARTS);
    let mut free = Limited::new(None, None);
    let plain = free.draw(&wanted);
    let mut fresh = Limited::new(Some(1 << 30), None);
    let taken = fresh.taken();
    let estimate = fresh.estimate(&wanted);
    println!("{estimate}");
    let way = |fallback: &Value| {
        let ways = estimate["ways"].as_array().unwrap();
        ways.iter().find(|way| way["rung"] == *fallback).unwrap()["needed"].as_u64().unwrap()
    };
    let check = |limit: u64, expected: &[&str]| {
        let mut worker = Limited::new(Some(limit), None);
        let estimate = worker.estimate(&wanted);
        assert_eq!(
            (fallbacks(&estimate["memory"]), &estimate["fits"]),
            (expected.to_vec(), &json!(true)),
            "{estimate}"
        );
        let made = worker.draw(&wanted);
        assert_eq!(fallbacks(&made["memory"]), expected, "{}", made["memory"]);
        assert_eq!(made["memory"]["why"].is_string(), !expected.is_empty());
        assert!(alike(&made, &plain), "{expected:?} makes another image");
        let (rss, peak) = (worker.process("rss"), worker.process("peak_rss"));
        let files = rss - worker.process("anonymous");
        println!("{expected:?}: limit {limit}, peak {} without files", peak - files);
        assert!(peak - files < limit + limit / 8, "{expected:?}: {} of {limit}", peak - files);
    };
    check(taken + way(&Value::Null) + SLACK, &[]);
    check(taken + way(&json!("strips")) + SLACK, &["strips"]);
    check(taken + way(&json!("slice")) + SLACK, &["strips", "slice"]);
    check(taken + way(&json!("text_encoders")) + SLACK, &["strips", "slice", "text_encoders"]);
    // Loaded networks are not counted again.
    let mut worker = Limited::new(Some(taken + way(&Value::Null) + KEPT), None);
    for time in 1..=3 {
        let made = worker.draw(&wanted);
        assert_eq!(fallbacks(&made["memory"]), [""; 0], "time {time}: {}", made["memory"]);
    }
}

#[test]
fn offloaded_unet_is_reused_in_the_same_memory() {
    let folder = tempfile::tempdir().unwrap();
    demo_folder(&folder.path().join("copy"));
    let wanted = with(request(256, 1), &json!({ "model": "copy", "offload": "sequential", "decode": "strips" }));
    let mut fresh = Limited::new(Some(1 << 30), Some(folder.path()));
    let (taken, needed) = (fresh.taken(), fresh.estimate(&wanted)["needed"].as_u64().unwrap());
    let mut tight = Limited::new(Some(taken + needed + KEPT / 2), Some(folder.path()));
    let first = tight.draw(&wanted);
    for _ in 0..2 {
        let again = tight.draw(&wanted);
        assert_eq!(again["memory"]["offload"], "sequential");
        assert!(image(&again) == image(&first));
    }
    let open = with(wanted, &json!({ "offload": "none" }));
    fresh.draw(&open);
    let unets = |worker: &mut Limited| {
        let status = worker.ask("communication", "status", &json!({}));
        status["residents"].as_array().unwrap().iter().filter(|one| one["kind"] == "unet").count()
    };
    fresh.draw(&with(open.clone(), &json!({ "offload": "sequential" })));
    assert_eq!(unets(&mut fresh), 1, "the one that was whole has gone");
    let refused =
        fresh.send("inference", "generate", &with(open, &json!({ "offload": "sequential", "quantization": "int8" })));
    assert_eq!(code(&refused), "unsupported_feature");
}

#[test]
fn impossible_request_evicts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    demo_folder(&folder.path().join("copy"));
    let small = with(request(256, 1), &json!({ "model": "copy" }));
    let mut fresh = Limited::new(Some(1 << 30), Some(folder.path()));
    let (taken, needed) = (fresh.taken(), fresh.estimate(&small)["needed"].as_u64().unwrap());
    let mut tight = Limited::new(Some(taken + needed + 4 * MIB), Some(folder.path()));
    tight.draw(&small);
    let mut held = || tight.ask("communication", "status", &json!({}))["residents"].as_array().unwrap().len();
    let before = held();
    assert_eq!(code(&tight.send("inference", "generate", &request(2048, 1))), "out_of_memory");
    let mut held = || tight.ask("communication", "status", &json!({}))["residents"].as_array().unwrap().len();
    assert_eq!(held(), before);
}

#[test]
fn out_of_memory_names_what_fits_and_the_next_request_works() {
    let mut fresh = Limited::new(Some(1 << 30), None);
    let (taken, wanted) = (fresh.taken(), request(1024, 1));
    let small = fresh.estimate(&request(256, 1));
    let needed = small["ways"].as_array().unwrap().last().unwrap()["needed"].as_u64().unwrap();
    let mut tight = Limited::new(Some(taken + needed + 4 * MIB), None);
    let estimate = tight.estimate(&wanted);
    assert_eq!(estimate["fits"], false);
    let largest = (estimate["largest"]["width"].as_u64().unwrap(), estimate["largest"]["height"].as_u64().unwrap());
    let refused = tight.send("inference", "generate", &wanted);
    assert_eq!(code(&refused), "out_of_memory");
    let error = &refused["error"];
    assert_eq!(error["stage"], "planning");
    assert!(error["needed"].as_u64() > error["free"].as_u64(), "{error}");
    let fits = error["fits"].as_str().unwrap();
    assert!(fits.contains(&format!("{}×{}", largest.0, largest.1)), "{fits} and {largest:?}");
    let made = tight.draw(&request(usize::try_from(largest.0).unwrap(), 1));
    assert_eq!(made["images"][0]["width"], largest.0);
}

#[test]
fn other_models_are_evicted_unless_pinned() {
    let folder = tempfile::tempdir().unwrap();
    demo_folder(&folder.path().join("copy"));
    let mut fresh = Limited::new(Some(1 << 30), Some(folder.path()));
    let (taken, own) = (fresh.taken(), request(256, 1));
    let other = with(own.clone(), &json!({ "model": "copy" }));
    let needed = fresh.estimate(&own)["needed"].as_u64().unwrap();
    let least = fresh.estimate(&with(own.clone(), &json!({ "offload": "none", "slice": false })));
    println!("{needed} {}", least["ways"]);
    let mut tight = Limited::new(Some(taken + needed + 8 * MIB), Some(folder.path()));
    assert_eq!(fallbacks(&tight.draw(&own)["memory"]), [""; 0]);
    let made = tight.draw(&other);
    assert_eq!(fallbacks(&made["memory"]).first(), Some(&"drop"), "{}", made["memory"]);
    let names = |worker: &mut Limited| -> Vec<String> {
        let status = worker.ask("communication", "status", &json!({}));
        let all = status["residents"].as_array().unwrap();
        let networks = all.iter().filter(|one| one["used_ms"].is_u64());
        networks.map(|one| format!("{} {}", one["kind"].as_str().unwrap(), one["name"].as_str().unwrap())).collect()
    };
    println!("{:?}", names(&mut tight));
    assert!(names(&mut tight).contains(&"unet copy".to_owned()));
    tight.ask("model", "pin", &json!({ "model": "copy" }));
    let refused =
        tight.send("inference", "generate", &with(own.clone(), &json!({ "decode": "whole", "offload": "none" })));
    assert_eq!(code(&refused), "out_of_memory", "{refused}");
    let hint = refused["error"]["hint"].as_str().unwrap();
    assert!(hint.contains("are pinned: `copy`"), "{hint}");
    // The pinned model still works.
    tight.draw(&other);
    tight.ask("model", "pin", &json!({ "model": "copy", "pin": false }));
    tight.draw(&own);
}

#[test]
fn estimate_is_near_the_measured_peak() {
    for (side, more) in [
        (512, json!({ "decode": "whole" })),
        (512, json!({ "decode": "strips" })),
        (1024, json!({ "decode": "whole" })),
        (1024, json!({ "decode": "strips" })),
    ] {
        let mut worker = Limited::new(None, None);
        worker.draw(&request(64, 1));
        let wanted = with(request(side, 1), &more);
        let before = worker.process("rss") - worker.process("kept");
        let estimate = worker.estimate(&wanted);
        worker.draw(&wanted);
        let measured = worker.process("peak_rss") - before;
        let estimated = estimate["activations"].as_u64().unwrap();
        let off = 100.0 * (estimated as f64 / measured as f64 - 1.0);
        println!("{side}² {more}: {estimated} estimated, {measured} measured, {off:+.0} %");
        assert!(off.abs() < 15.0, "{side}² {more}: {estimated} estimated, {measured} measured");
    }
}
