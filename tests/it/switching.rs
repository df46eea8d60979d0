//! Models alternate two hundred times, and the process's memory stays as it was after the first ten switches.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and tells what it measured")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sdxl_worker::noise::{NoiseSource, RngKind};
use serde_json::{Value, json};

use crate::conditioning::demo_folder;
use crate::single_file::single;
use crate::wire::Worker;

const MIB: u64 = 1 << 20;
const SWITCHES: usize = 200;
/// Switches after which memory should be stable.
const WARM: usize = 10;
/// Less than two of the models, of 33 MB each.
const CACHE: &str = "45MB";

struct Pool {
    worker: Worker,
    requests: usize,
}

impl Pool {
    fn ask(&mut self, worker_type: &str, operation: &str, data: &Value) -> Value {
        self.requests += 1;
        let id = format!("s-{}", self.requests);
        let line = json!({ "request_id": id, "worker_type": worker_type, "operation": operation, "data": data });
        self.worker.send(&line);
        let answer = self.worker.answer(&id);
        assert_eq!(answer["success"], true, "{answer}");
        answer["data"].clone()
    }

    fn of_process(&self, file: &str) -> std::path::PathBuf {
        Path::new("/proc").join(self.worker.child.id().to_string()).join(file)
    }

    /// Resident bytes.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(self.of_process("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() * 1024
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(self.of_process("fd")).unwrap().count()
    }

    fn residents(&mut self) -> Vec<Value> {
        self.ask("communication", "status", &json!({}))["residents"].as_array().unwrap().clone()
    }
}

/// The demonstration model with a little noise added to its UNet's weights.
fn other_weights(folder: &Path) {
    demo_folder(folder);
    let file = folder.join("unet/diffusion_pytorch_model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let total = tensors.values().map(Tensor::elem_count).sum();
    let noise = NoiseSource::new(RngKind::Cpu, &[6], 1, 1, total, &Device::Cpu).draw().unwrap().flatten_all().unwrap();
    let mut at = 0;
    let mut changed = HashMap::new();
    for name in names {
        let tensor = &tensors[name];
        let own = noise.narrow(0, at, tensor.elem_count()).unwrap().reshape(tensor.shape()).unwrap();
        at += tensor.elem_count();
        let other = (tensor.to_dtype(DType::F32).unwrap() * ((own * 0.1).unwrap() + 1.0).unwrap()).unwrap();
        changed.insert(name.clone(), other.to_dtype(tensor.dtype()).unwrap());
    }
    candle_core::safetensors::save(&changed, file).unwrap();
}

#[test]
fn two_hundred_model_switches_leak_nothing() {
    let models = tempfile::tempdir().unwrap();
    let whole = tempfile::tempdir().unwrap();
    demo_folder(whole.path());
    single(whole.path(), 1).write(&models.path().join("file.safetensors"));
    other_weights(&models.path().join("other"));
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapters/files");
    let config = models.path().join("config.json");
    let settings =
        json!({ "device": { "device": "cpu" }, "model": { "cache_size": CACHE, "roots": [models.path(), adapters] } });
    fs::write(&config, json!({ "workers": { "instructors": settings } }).to_string()).unwrap();
    let worker = Worker::start(&["--config", config.to_str().unwrap()]);
    let mut pool = Pool { worker, requests: 0 };
    let names = ["demo", "file", "other"];
    let loras = [json!([]), json!(["kohya"]), json!([{ "model": "peft", "weight": 0.7 }])];
    let options = |turn: usize| {
        // Every round but the last has a new prompt, so that it is not cached.
        json!({ "model": names[turn % 3], "loras": loras[turn / 3 % 3], "prompt": format!("a hill {}", turn / 3 % 66), "steps": 1, "width": 64, "height": 64,
                "seed": 5, "output": { "return": "base64", "metadata": false } })
    };
    let mut first: HashMap<usize, String> = HashMap::new();
    let (mut warm, mut open) = (0, 0);
    let mut evicted = 0;
    for turn in 0..SWITCHES {
        let made = pool.ask("inference", "generate", &options(turn));
        let bytes = made["images"][0]["base64"].as_str().unwrap().to_owned();
        let adapters = made["adapters"].as_array().map_or(0, Vec::len);
        assert_eq!(adapters, usize::from(turn / 3 % 3 > 0), "{}", made["adapters"]);
        let same = first.entry(turn % 198).or_insert_with(|| bytes.clone());
        assert!(*same == bytes, "switch {turn}: another image than before");
        if turn + 1 == WARM {
            (warm, open) = (pool.resident(), pool.descriptors());
        }
        if turn % 20 == 19 {
            let residents = pool.residents();
            let unets: Vec<&Value> = residents.iter().filter(|one| one["kind"] == "unet").collect();
            evicted += usize::from(unets.iter().all(|one| one["name"] == made["model"]));
            let networks = residents.iter().filter(|one| one["used_ms"].is_u64());
            let bytes: u64 = networks.map(|one| one["bytes"].as_u64().unwrap()).sum();
            println!(
                "after {:>3}: {} MiB resident, {} descriptors, {bytes} bytes of networks",
                turn + 1,
                pool.resident() / MIB,
                pool.descriptors()
            );
            assert!(bytes <= 45_000_000, "{residents:?}");
            assert!(pool.resident() <= warm + 64 * MIB, "switch {turn}: {} and at first {warm}", pool.resident());
            assert!(
                pool.descriptors() <= open,
                "switch {turn}: {} descriptors and at first {open}",
                pool.descriptors()
            );
        }
    }
    // The last round's prompt was cached, so no text encoder displaced another UNet.
    assert!(evicted + 1 >= SWITCHES / 20, "{evicted}: nothing was evicted");
    assert_ne!(first[&1], first[&2], "other weights make the same image");
    assert_eq!(first[&0], first[&1], "a model in one file makes another image");

    let (before, held) = (pool.resident(), pool.residents());
    let bytes: u64 = held.iter().map(|one| one["bytes"].as_u64().unwrap()).sum();
    let freed = pool.ask("model", "unload", &json!({}));
    println!("unload: {} freed of {bytes}, resident {before} and then {}", freed["freed"], pool.resident());
    let networks = held.iter().filter(|one| one["used_ms"].is_u64() || one["kind"] == "tokenizer");
    assert_eq!(freed["freed"], networks.map(|one| one["bytes"].as_u64().unwrap()).sum::<u64>());
    assert!(before - pool.resident() > 20 * MIB, "{before} and then {}", pool.resident());
    assert!(pool.residents().iter().all(|one| one["kind"] == "embeddings"), "{:?}", pool.residents());
}
