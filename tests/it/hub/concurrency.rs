//! Downloads while other requests go on.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{FIRST, Place, SECOND, UNET, ask, demo, fetched, image, model};
use crate::hub_server::Faults;
use crate::wire::{code, long};

#[test]
fn fetch_blocks_no_request_and_is_cancellable() {
    let place = Place::new();
    place.hub.fail(Faults { slow: Some(Duration::from_millis(200)), ..Faults::default() });
    let mut worker = place.worker(true);
    let slow = model("slow", "fetch", &json!({ "model": "owner/demo" }));
    worker.send(&slow);
    worker.send(&model("next", "fetch", &json!({ "model": "owner/demo" })));
    // Generation and queries go on meanwhile.
    image(&mut worker, "demo", None);
    ask(&mut worker, "list", &json!({}));
    let status = worker.ask("status", "status", &json!({}));
    assert_eq!(
        (&status["running"][0]["request_id"], &status["queue"][0]["request_id"]),
        (&json!("slow"), &json!("next"))
    );
    for (id, found) in [("next", "queued"), ("slow", "running")] {
        assert_eq!(worker.ask("cancel", "cancel", &json!({ "request_id": id }))["found"], found);
    }
    assert_eq!(code(&worker.answer("slow")), "cancelled");

    // A silent connection does not block cancellation or a deadline.
    place.hub.fail(Faults { silent: true, ..Faults::default() });
    let begun = Instant::now();
    let mut late = slow.clone();
    late["timeout_ms"] = json!(300);
    worker.send(&late);
    assert_eq!(code(&worker.answer("slow")), "deadline_exceeded");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

    // Bytes that arrived before are not downloaded again.
    place.hub.fail(Faults::default());
    place.hub.seen();
    assert_eq!(fetched(&mut worker, &json!({ "model": "owner/demo" }))["success"], Value::Null);
    assert!(place.hub.seen().iter().any(|request| request.range.is_some()), "it goes on");

    fs::remove_dir_all(place.cache()).unwrap();
    place.hub.fail(Faults { silent: true, ..Faults::default() });
    worker.send(&slow);
    worker.send(&long("image"));
    let ending = worker.ask("end", "shutdown", &json!({ "mode": "cancel" }));
    assert_eq!(ending["draining"], true);
    let (lines, exit) = worker.rest();
    let cancelled = lines.iter().filter(|line| line["type"] == "error" && code(line) == "cancelled").count();
    assert_eq!((cancelled, exit), (2, Some(0)));
}

#[test]
fn generation_waits_for_its_download_and_others_overtake() {
    let place = Place::new();
    place.hub.fail(Faults { slow: Some(Duration::from_millis(60)), ..Faults::default() });
    let mut worker = place.worker(true);
    let data = json!({ "prompt": "a hill", "steps": 2, "seed": 7, "model": "owner/demo" });
    let line = |id: &str| json!({ "request_id": id, "worker_type": "inference", "operation": "generate", "data": data, "events": {} });
    worker.send(&line("first"));
    worker.until(|line| line["request_id"] == "first" && line["event"] == "fetching");
    let (other, _) = image(&mut worker, "demo", None);
    let mut events = Vec::new();
    let answer = loop {
        let line = worker.next().unwrap();
        if line["request_id"] == "first" && line["type"] != "event" {
            break line;
        }
        events.push(line["event"].as_str().unwrap_or_default().to_owned());
    };
    assert_eq!(answer["success"], true, "{answer}");
    assert!(events.iter().all(|event| event != "started"), "it has started once: {events:?}");
    assert_eq!(answer["data"]["parameters"]["revision"], FIRST);
    let path = answer["data"]["images"][0]["path"].as_str().unwrap();
    assert_eq!(fs::read(worker.folder.path().join(path)).unwrap(), other);

    // A partial repository is completed; one that cannot be keeps its own error.
    fs::remove_dir_all(place.cache()).unwrap();
    place.hub.fail(Faults::default());
    fetched(&mut worker, &json!({ "model": "owner/demo/unet" }));
    assert_eq!(code(&ask(&mut worker, "inspect", &json!({ "model": "owner/demo" }))), "model_unsupported");
    assert_eq!(image(&mut worker, "owner/demo", None).0, other);
    place.hub.commit("owner/half", &["main"], SECOND, demo().into_iter().filter(|(name, _)| name != UNET).collect());
    assert_eq!(code(&ask(&mut worker, "load", &json!({ "model": "owner/half" }))), "model_corrupt");
    assert_eq!(code(&ask(&mut worker, "load", &json!({ "model": "owner/half/unet" }))), "model_unsupported");
    place.hub.fail(Faults { slow: Some(Duration::from_millis(60)), ..Faults::default() });

    fs::remove_dir_all(place.cache()).unwrap();
    worker.send(&line("second"));
    worker.until(|line| line["request_id"] == "second" && line["event"] == "fetching");
    worker.send(&line("third"));
    place.hub.fail(Faults {
        status: Some(("/api/".to_owned(), 404)),
        slow: Some(Duration::from_millis(60)),
        ..Faults::default()
    });
    assert_eq!(worker.ask("cancel", "cancel", &json!({ "request_id": "second" }))["found"], "running");
    assert_eq!(code(&worker.answer("second")), "cancelled");
    assert_eq!(code(&worker.answer("third")), "model_not_found");
    let _ = fs::remove_dir_all(place.cache());
    worker.send(&line("fourth"));
    assert_eq!(code(&worker.answer("fourth")), "model_not_found");
}
