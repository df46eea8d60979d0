//! Who may use whom: modules by their order in `lib.rs`, layers within a domain, libraries by layer.

use super::assert_none;
use super::imports::{circles, imports};
use super::sources::{Source, identifiers, production};

const DOMAINS: [&str; 7] =
    ["device", "scheduler", "model", "conditioning", "postprocessing", "inference", "communication"];

/// Files in which a circle of imports may run at most.
const LARGEST_CIRCLE: usize = 3;

fn modules() -> Vec<&'static str> {
    let lib = production().iter().find(|source| source.path == "src/lib.rs").unwrap();
    lib.text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect()
}

#[test]
fn modules_use_only_what_stands_above_them() {
    let order = modules();
    let rank = |name: &str| order.iter().position(|known| *known == name);
    let mut wrong = Vec::new();
    for source in production().iter().filter(|source| !source.is_crate_root()) {
        let own = source.module().swap_remove(0);
        let Some(own_rank) = rank(&own) else {
            wrong.push(format!("{}: `{own}` is no `pub mod` of src/lib.rs", source.path));
            continue;
        };
        for import in imports(source) {
            let Some(used) = import.path.first().and_then(|first| rank(first)) else { continue };
            if used > own_rank {
                let place = format!("{}:{}", source.path, import.line);
                let cure = "move what is used up, or the user down";
                let message =
                    format!("{place} uses `{}`, which stands below `{own}` in src/lib.rs: {cure}", import.text());
                wrong.push(message);
            }
        }
    }
    assert_none(wrong);
}

/// Modules of its own domain that a layer may not use.
fn forbidden(domain: &str, layer: &str) -> &'static [&'static str] {
    match layer {
        // A sampling plan is what samplers execute, not the code that decides on it.
        "workers" if domain == "scheduler" => &["instructor", "manager", "managers"],
        "interface" | "request" => &["instructor", "plan", "manager", "managers", "workers"],
        "plan" => &["instructor", "manager", "managers"],
        "manager" | "managers" => &["instructor"],
        "workers" => &["instructor", "plan", "manager", "managers"],
        "networks" => &["instructor", "manager", "managers", "workers", "interface"],
        _ => &[],
    }
}

#[test]
fn layers_point_down() {
    let mut wrong = Vec::new();
    for source in production() {
        let module = source.module();
        let [domain, layer, ..] = module.as_slice() else { continue };
        if !DOMAINS.contains(&domain.as_str()) {
            continue;
        }
        for import in imports(source) {
            let upper = import.path.get(1).filter(|_| import.path[0] == *domain);
            if upper.is_some_and(|upper| forbidden(domain, layer).contains(&upper.as_str())) {
                let place = format!("{}:{}", source.path, import.line);
                let cure = "take it as an argument, or move it to a layer below";
                let message = format!("{place} ({layer}) uses `{}`, which is above it: {cure}", import.text());
                wrong.push(message);
            }
        }
    }
    assert_none(wrong);
}

#[test]
fn imports_run_in_no_large_circle() {
    let describe = |circle: Vec<&str>| {
        let cure = "move what they share to a file of its own";
        let message = format!("{} files import each other: {cure}\n    {}", circle.len(), circle.join("\n    "));
        message
    };
    assert_none(circles(LARGEST_CIRCLE).into_iter().map(describe).collect());
}

/// Where a library or function may be used.
struct Usage {
    word: &'static str,
    /// Paths may begin with these.
    only_in: &'static [&'static str],
    but_not_in: &'static [&'static str],
    cure: &'static str,
}

impl Usage {
    fn violations(&self) -> Vec<String> {
        let starts = |source: &Source, folders: &[&str]| folders.iter().any(|folder| source.path.starts_with(folder));
        let outside = |source: &&Source| !starts(source, self.only_in) || starts(source, self.but_not_in);
        let describe = |source: &Source| {
            let line = source.line(find_word(&source.production, self.word)?);
            let message = format!("{}:{line} uses `{}`: {}", source.path, self.word, self.cure);
            Some(message)
        };
        production().iter().filter(outside).filter_map(describe).collect()
    }
}

/// The first place where the identifiers of `word` follow each other.
fn find_word(code: &str, word: &str) -> Option<usize> {
    let first = identifiers(word).next()?.0;
    let (before, rest) = word.split_at(first);
    identifiers(code).map(|(at, _)| at).find(|at| {
        let behind = code[*at..].strip_prefix(rest);
        behind.is_some_and(|behind| !behind.starts_with(super::sources::is_word)) && code[..*at].ends_with(before)
    })
}

#[test]
fn json_stays_at_the_edges() {
    let usage = Usage {
        word: "serde_json",
        only_in: &[
            "src/communication/",
            "src/runtime/config.rs",
            "src/model/",
            "src/postprocessing/metadata.rs",
            "src/postprocessing/workers/",
            "src/main.rs",
        ],
        but_not_in: &["src/model/networks/"],
        cure: "give the type fields, and parse it in communication, in the configuration or where the file is read",
    };
    assert_none(usage.violations());
}

#[test]
fn async_stays_above_the_lane() {
    let usage = Usage {
        word: "tokio",
        only_in: &["src/communication/", "src/main.rs", "src/runtime/lane.rs"],
        but_not_in: &[],
        cure: "below the lane everything blocks; wait in communication",
    };
    assert_none(usage.violations());
}

#[test]
fn noise_comes_from_noise_rs_alone() {
    for word in ["Tensor::rand", "Tensor::randn", ".rand_like", ".randn_like"] {
        let cure = "draw from `NoiseSource`, so that an image depends on its seed alone";
        let usage = Usage { word, only_in: &["src/noise.rs"], but_not_in: &[], cure };
        assert_none(usage.violations());
    }
}

#[test]
fn requests_and_plans_hold_no_tensors() {
    let but_not_in = &["src/inference/plan/", "src/inference/request/"];
    let cure = "compute it in a worker or in the pipeline";
    let of = |word| Usage { word, only_in: &["src/"], but_not_in, cure }.violations();
    assert_none(["candle_core", "candle_nn"].into_iter().flat_map(of).collect());
}

/// Scratch buffers of the CPU kernels' threads; nothing that steers a computation.
const SCRATCH_BUFFERS: &[&str] = &["src/kernels/cpu/scratch.rs"];

#[test]
fn thread_locals_are_scratch_buffers() {
    let cure = "pass it as an argument";
    let usage = Usage { word: "thread_local", only_in: SCRATCH_BUFFERS, but_not_in: &[], cure };
    assert_none(usage.violations());
    for path in SCRATCH_BUFFERS {
        let source = production().iter().find(|source| source.path == *path);
        let used = source.is_some_and(|source| find_word(&source.production, "thread_local").is_some());
        assert!(used, "`{path}` has no `thread_local`: remove it from the list");
    }
}
