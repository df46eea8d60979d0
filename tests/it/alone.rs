//! An image depends on its request alone: the same bytes in any batch, after any request and next to any other.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::{Value, json};

use crate::wire::Worker;

/// `data`, overridden by the fields of `more`.
fn with(data: &Value, more: &Value) -> Value {
    let mut joined = data.clone();
    joined.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    joined
}

fn line(id: &str, operation: &str, data: &Value) -> Value {
    json!({ "request_id": id, "worker_type": "inference", "operation": operation, "data": data })
}

/// The files of a result, in base64.
fn files(generated: &Value) -> Vec<String> {
    let images = generated["images"].as_array().unwrap();
    images.iter().map(|image| image["base64"].as_str().unwrap().to_owned()).collect()
}

/// The files of the answer to `id`.
fn made(worker: &Worker, id: &str) -> Vec<String> {
    let answer = worker.answer(id);
    assert_eq!(answer["success"], true, "{answer}");
    files(&answer["data"])
}

fn make(worker: &mut Worker, id: &str, data: &Value) -> Vec<String> {
    worker.send(&line(id, "generate", data));
    made(worker, id)
}

/// `fields` make an image whose metadata contains `text`; it is the third of four whose seeds count up from `first`.
fn check(fields: &Value, first: &Value, text: &str) {
    let base = json!({ "prompt": "a hill", "negative_prompt": "fog", "steps": 4, "width": 64, "height": 64,
        "sampler_name": "euler_ancestral", "cfg_scale": 4.0, "output": { "return": "base64" } });
    let one = with(&base, fields);
    let four = with(&one, first);
    let other = with(
        &base,
        &json!({ "prompt": "a boat at sea", "seed": 77, "width": 96, "sampler_name": "dpmpp_2m_sde",
        "pag_scale": 2.0, "freeu": {}, "cfg_interval": [0.5, 1.0], "subseed": 9, "subseed_strength": 0.5 }),
    );

    let mut worker = Worker::start(&[]);
    let alone = make(&mut worker, "alone", &one);
    assert_eq!(alone.len(), 1);
    let third = |name: &str, files: &[String]| {
        assert_eq!(files.len(), 4, "{name}");
        assert!(files[2] == alone[0], "{name}: another image than alone, {fields}");
        assert!(files.iter().enumerate().all(|(i, file)| i == 2 || *file != alone[0]), "{name}: all the same");
    };
    third("a batch", &make(&mut worker, "batch", &with(&four, &json!({ "batch_size": 4 }))));
    third("batches", &make(&mut worker, "batches", &with(&four, &json!({ "batch_size": 2, "n_iter": 2 }))));
    let requests = json!({ "requests": [other, with(&one, &json!({ "seed": 6 })), one, other] });
    worker.send(&line("requests", "batch", &requests));
    let results = worker.answer("requests");
    let all: Vec<String> = results["data"]["results"].as_array().unwrap().iter().flat_map(files).collect();
    third("requests", &all);

    // After another image in the same process, and with other requests in the queue.
    let mut worker = Worker::start(&[]);
    make(&mut worker, "other", &other);
    assert!(make(&mut worker, "after", &one) == alone, "after another request: another image, {fields}");
    for (id, data) in [("before", &other), ("between", &one), ("behind", &other), ("last", &one)] {
        worker.send(&line(id, "generate", data));
    }
    for id in ["before", "between", "behind", "last"] {
        let made = made(&worker, id);
        assert_eq!(made == alone, ["between", "last"].contains(&id), "{id} in the queue, {fields}");
    }

    // The request in the file's metadata makes that image alone.
    worker.send(&json!({ "request_id": "metadata", "worker_type": "postprocessing", "operation": "metadata",
        "data": { "image": { "base64": alone[0] } } }));
    let metadata = worker.answer("metadata");
    assert!(metadata["data"]["parameters"].as_str().unwrap().contains(text), "`{text}` is not in {metadata}");
    let request = metadata["data"]["request"].clone();
    let again = make(&mut worker, "again", &with(&request, &json!({ "output": { "return": "base64" } })));
    assert!(again == alone, "the request in the file makes another image: {request}");
}

#[test]
fn image_depends_on_its_request_alone() {
    check(&json!({ "seed": 5 }), &json!({ "seed": 3 }), "Seed: 5, Size: 64x64");
}

#[test]
fn variation_depends_on_its_request_alone() {
    check(
        &json!({ "seed": 5, "subseed": 12, "subseed_strength": 0.3, "cfg_interval": [0.0, 0.5],
            "skip_layer": { "start": 0.0, "stop": 1.0 }, "dynamic_thresholding": { "mimic_scale": 3.0 } }),
        &json!({ "subseed": 10 }),
        "Variation seed: 12, Variation seed strength: 0.3",
    );
}
