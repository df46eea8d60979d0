//! Mapped and read weights give the same image, and only the mapped files appear in the process.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::json;

use crate::conditioning::demo_folder;
use crate::wire::Worker;

/// The pixels of an image from a copy of the demonstration model, and true if its files are mapped afterwards.
fn draw(flags: &[&str]) -> (image::RgbImage, bool) {
    let models = tempfile::tempdir().unwrap();
    let folder = models.path().join("copy");
    demo_folder(&folder);
    let root = models.path().to_str().unwrap();
    let mut worker = Worker::start(&[&["--model-root", root, "--device", "cpu"], flags].concat());
    worker.send(&json!({
        "request_id": "r", "prompt": "A sunset over mountains", "model": "copy", "seed": 42, "steps": 2,
        "width": 128, "height": 128, "output": { "path": "r.png" },
    }));
    let answer = worker.answer("r");
    assert_eq!(answer["success"], true, "{answer}");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", worker.child.id())).unwrap();
    let path = worker.folder.path().join(answer["data"]["images"][0]["path"].as_str().unwrap());
    let pixels = image::open(path).unwrap().to_rgb8();
    worker.close_stdin();
    worker.rest();
    (pixels, maps.contains(folder.to_str().unwrap()))
}

#[test]
fn mapped_and_read_weights_give_the_same_image() {
    let ((mapped, seen), (read, still_seen)) = (draw(&[]), draw(&["--no-mmap"]));
    assert!(seen, "no file is mapped");
    assert!(!still_seen, "a file is mapped in spite of the flag");
    assert!(mapped == read, "the pictures differ");
}
