//! The design's invariants, read off the source tree.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use sdxl_worker::error::Error;

fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    walk(&root.join(folder), &mut found);
    found.sort();
    assert!(!found.is_empty(), "no sources under `{folder}`");
    found
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/"), text)
        })
        .collect()
}

/// The text without comments, so that prose may name what code may not use.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn modules() -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')))
        .map(str::to_owned)
        .collect()
}

const DOMAINS: [&str; 7] =
    ["device", "scheduler", "model", "conditioning", "postprocessing", "inference", "communication"];

/// Names after `crate::` in a text, with what follows them up to the next non-path character.
fn crate_paths(text: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + 7..];
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(rest.len());
        paths.push(rest[..end].trim_end_matches(':').to_owned());
    }
    paths
}

#[test]
fn a_module_uses_only_what_stands_above_it() {
    let order = modules();
    let rank = |name: &str| order.iter().position(|known| known == name);
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let own = path.trim_start_matches("src/").split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        let Some(own_rank) = rank(&own) else { continue };
        for used in crate_paths(&code(&text)) {
            let first = used.split("::").next().unwrap();
            if let Some(used_rank) = rank(first) {
                // `context` and `layers` name each other: a worker takes the context that runs it.
                let pair =
                    [own.as_str(), first] == ["context", "layers"] || [own.as_str(), first] == ["layers", "context"];
                if used_rank > own_rank && !pair {
                    wrong.push(format!("{path} uses `crate::{used}`, which stands below it in lib.rs"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn layers_point_down() {
    // In a domain: interface < instructor > manager > workers. Nobody calls upwards.
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let parts: Vec<&str> = path.trim_start_matches("src/").split('/').collect();
        if !DOMAINS.contains(&parts[0]) || parts.len() < 2 || parts[0] == "communication" {
            continue;
        }
        let layer = parts[1].trim_end_matches(".rs");
        let forbidden: &[&str] = match layer {
            "interface" => &["instructor", "manager", "managers", "workers"],
            "manager" | "managers" => &["instructor"],
            "networks" => &["instructor", "manager", "managers", "workers", "interface"],
            _ => &[],
        };
        let code = code(&text);
        for upper in forbidden {
            for form in [format!("super::{upper}::"), format!("crate::{}::{upper}::", parts[0])] {
                if code.contains(&form) && !(form.starts_with("super::") && parts.len() > 2) {
                    wrong.push(format!("{path} ({layer}) uses `{form}`"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn json_stays_at_the_edges() {
    let allowed = [
        "src/communication/",
        "src/runtime/config.rs",
        "src/model/",
        "src/postprocessing/metadata.rs",
        "src/postprocessing/workers/",
        "src/main.rs",
    ];
    check_absent("serde_json", &allowed, &["src/model/networks/"]);
}

#[test]
fn async_stays_above_the_lane() {
    check_absent("tokio", &["src/communication/", "src/main.rs", "src/runtime/lane.rs"], &[]);
}

#[test]
fn noise_comes_from_noise_rs_alone() {
    for word in ["Tensor::rand", "Tensor::randn", ".rand_like", ".randn_like"] {
        check_absent(word, &["src/noise.rs"], &[]);
    }
}

fn check_absent(word: &str, allowed: &[&str], but_not: &[&str]) {
    let offenders: Vec<String> = sources("src")
        .into_iter()
        .filter(|(path, text)| {
            let permitted = allowed.iter().any(|a| path.starts_with(a)) && !but_not.iter().any(|a| path.starts_with(a));
            code(text).contains(word) && !permitted
        })
        .map(|(path, _)| path)
        .collect();
    assert!(offenders.is_empty(), "`{word}` is used in {offenders:?}, allowed only in {allowed:?}");
}

#[test]
fn every_file_says_what_it_owns_and_is_short() {
    let mut wrong = Vec::new();
    for folder in ["src", "tests/it", "benches"] {
        for (path, text) in sources(folder) {
            if !text.starts_with("//!") {
                wrong.push(format!("{path} does not open with `//!`"));
            }
            let limit = if path.contains("/networks/") || path.contains("/kernels/") { 800 } else { 500 };
            let lines = text.lines().count();
            if path.starts_with("src") && lines > limit {
                wrong.push(format!("{path} has {lines} lines, {limit} are allowed"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_module_is_named_for_nothing() {
    for (path, _) in sources("src") {
        for name in ["utils", "common", "helpers", "types"] {
            assert!(!path.split('/').any(|part| part.trim_end_matches(".rs") == name), "`{path}` is named `{name}`");
        }
    }
}

#[test]
fn error_codes_are_never_reused_or_renamed() {
    // Appending is the only change this list may see.
    let snapshot = "invalid_json invalid_utf8 line_too_long invalid_request unknown_operation invalid_parameter \
                    unknown_name unsupported_feature duplicate_request_id queue_full draining deadline_exceeded \
                    cancelled model_not_found model_corrupt model_unsupported unsafe_format path_not_allowed offline \
                    download_failed image_decode_failed image_too_large out_of_memory device_unavailable device_lost \
                    numerical_error safety_blocked output_exists output_write_failed internal";
    assert_eq!(Error::CODES.join(" "), snapshot);
}

/// Words in backticks of a page that look like a source path or an operation must exist.
#[test]
fn what_the_pages_name_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    for page in ["README.md", "src/communication/PROTOCOL.md", "src/lib.rs"] {
        let text = fs::read_to_string(root.join(page)).unwrap_or_else(|e| panic!("{page}: {e}"));
        for word in text.split('`').skip(1).step_by(2) {
            let is_path = ["src/", "tests/", "configs/", "assets/", "benches/"].iter().any(|p| word.starts_with(p));
            if is_path && !word.contains(['*', '{', '<', ' ']) && !root.join(word).exists() {
                wrong.push(format!("{page} names `{word}`, which does not exist"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
