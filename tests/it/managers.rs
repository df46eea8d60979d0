//! The contract of managers: each can evict everything that it lists, and reports the bytes that it frees.

use std::path::Path;

use sdxl_worker::conditioning::manager::ConditioningResources;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::layers::Manager;
use sdxl_worker::runtime::config::Config;
use sdxl_worker::units::Bytes;
use serde_json::json;

use crate::adapters;
use crate::drawing::Worker;

fn listed(manager: &dyn Manager) -> Bytes {
    manager.resident().iter().map(|resident| resident.bytes).sum()
}

fn check_eviction(name: &str, manager: &mut dyn Manager) {
    let before = listed(manager);
    assert!(before > Bytes(0), "{name} keeps nothing");
    let freed = manager.evict(Bytes(1));
    assert!(freed > Bytes(0), "{name} frees nothing");
    assert_eq!(freed, before.saturating_sub(listed(manager)), "{name}");
    let rest = listed(manager);
    assert_eq!(manager.evict(Bytes(u64::MAX)), rest, "{name}");
    assert!(manager.resident().is_empty(), "{name}: {:?}", manager.resident());
    assert_eq!(manager.evict(Bytes(u64::MAX)), Bytes(0), "{name}");
}

#[test]
fn every_manager_evicts_everything_that_it_lists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![adapters::networks(), root.join("assets")];
    config.workers.instructors.postprocessing.roots = vec![root.join("tests/steer")];
    let mut worker = Worker::with(&config);
    let image = "tests/steer/files/adapter_outline.png";
    let request: GenerateRequest = serde_json::from_value(json!({
        "prompt": "a barn", "width": 64, "height": 64, "steps": 1, "seed": 1,
        "controlnet": { "model": "demo-controlnet", "image": image, "preprocessor": "canny" },
        "t2i_adapter": { "model": "t2i/outline", "image": image },
    }))
    .unwrap();
    worker.draw(&request);
    let ConditioningResources { model, embeddings, hints } = &mut worker.managers.conditioning;
    check_eviction("hints", hints);
    check_eviction("embeddings", embeddings);
    check_eviction("tokenizers", &mut model.tokenizers);
    check_eviction("encoders", &mut model.encoders);
    check_eviction("unets", &mut model.unets);
    check_eviction("vaes", &mut model.vaes);
    check_eviction("controlnets", &mut model.controlnets);
    check_eviction("adapters", &mut model.adapters);
    assert!(worker.managers.resident().is_empty());
}
