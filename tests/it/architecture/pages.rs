//! README and PROTOCOL compared with the registries, both ways: what a page lists exists, and what exists is listed.

use std::collections::BTreeSet;
use std::fs;

use sdxl_worker::communication::interface::{Communication, NOT_PERFORMED};
use sdxl_worker::conditioning::PREPROCESSORS;
use sdxl_worker::conditioning::interface::Conditioning;
use sdxl_worker::device::interface::Device;
use sdxl_worker::error::Error;
use sdxl_worker::inference::interface::Inference;
use sdxl_worker::layers::Interface;
use sdxl_worker::model::interface::Model;
use sdxl_worker::postprocessing::UPSCALERS;
use sdxl_worker::postprocessing::interface::Postprocessing;
use sdxl_worker::scheduler::interface::Scheduler;
use sdxl_worker::scheduler::workers::{SAMPLERS, SPACINGS};

use super::sources::root;

const README: &str = "README.md";
const PROTOCOL: &str = "src/communication/PROTOCOL.md";

fn page(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The words in backticks of a text.
fn quoted(text: &str) -> BTreeSet<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The rest of the first line that contains `start`, behind it, up to `end`.
#[track_caller]
fn behind<'a>(path: &str, text: &'a str, start: &str, end: &str) -> &'a str {
    let Some((_, rest)) = text.split_once(start) else { panic!("{path} has no list that begins with {start:?}") };
    rest.split_once(end).map_or(rest, |(list, _)| list)
}

/// The rows of the table whose header begins with `header`; backticks in the header are ignored.
#[track_caller]
fn table<'a>(path: &str, text: &'a str, header: &str) -> Vec<&'a str> {
    let rows = text.lines().skip_while(|line| !line.replace('`', "").starts_with(header)).skip(2);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(!rows.is_empty(), "{path} has no table that begins with {header:?}");
    rows
}

#[track_caller]
fn check(path: &str, kind: &str, listed: &BTreeSet<&str>, known: impl IntoIterator<Item = &'static str>) {
    let known: BTreeSet<&str> = known.into_iter().collect();
    let missing: Vec<_> = known.difference(listed).collect();
    let invented: Vec<_> = listed.difference(&known).collect();
    assert!(missing.is_empty(), "{path} does not list the {kind} {missing:?}: add them");
    assert!(invented.is_empty(), "{path} lists the {kind} {invented:?}, which do not exist: remove them");
}

#[test]
fn pages_list_every_operation() {
    fn of<I: Interface>() -> (&'static str, &'static [&'static str]) {
        (I::DOMAIN.name(), I::OPERATIONS)
    }
    let performed = [
        of::<Inference>(),
        of::<Model>(),
        of::<Conditioning>(),
        of::<Scheduler>(),
        of::<Postprocessing>(),
        of::<Device>(),
        of::<Communication>(),
    ];
    for path in [README, PROTOCOL] {
        let text = page(path);
        let rows = table(path, &text, "| worker_type | operations");
        let mut domains = BTreeSet::new();
        for row in rows {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let domain = cells[1].trim_matches('`');
            let known = performed.iter().find(|(name, _)| *name == domain);
            let (_, operations) = known.unwrap_or_else(|| panic!("{path} lists `{domain}`, which is no domain"));
            check(path, &format!("operations of `{domain}`"), &quoted(cells[2]), operations.iter().copied());
            domains.insert(domain);
        }
        check(path, "domains", &domains, performed.iter().map(|(name, _)| *name));
    }
}

#[test]
fn protocol_names_the_operations_that_are_not_performed() {
    let text = page(PROTOCOL);
    let known = NOT_PERFORMED.iter().map(|(_, operation)| *operation);
    let words = quoted(&text);
    let missing: Vec<&str> = known.filter(|operation| !words.contains(operation)).collect();
    assert!(missing.is_empty(), "{PROTOCOL} does not name the operations {missing:?}: add them");
}

#[test]
fn readme_lists_every_sampler_and_schedule() {
    let text = page(README);
    check(README, "samplers", &quoted(behind(README, &text, "| samplers |", "|\n")), SAMPLERS.names());
    check(README, "schedules", &quoted(behind(README, &text, "| schedules |", ", or")), SPACINGS.names());
}

#[test]
fn pages_list_every_preprocessor() {
    let text = page(README);
    check(README, "preprocessors", &quoted(behind(README, &text, "preprocessors ", "|\n")), PREPROCESSORS.names());
    let text = page(PROTOCOL);
    let rows = table(PROTOCOL, &text, "| preprocessor |");
    let listed = rows.iter().flat_map(|row| quoted(row.split('|').nth(1).unwrap())).collect();
    check(PROTOCOL, "preprocessors", &listed, PREPROCESSORS.names());
}

#[test]
fn pages_list_every_upscaler() {
    let text = page(README);
    check(README, "upscalers", &quoted(behind(README, &text, "| upscalers |", "|\n")), UPSCALERS.names());
    let request = page("src/inference/request/generate.rs");
    let comment = behind("generate.rs", &request, "/// Upscaler between the passes:", "Default:");
    check("generate.rs", "upscalers", &quoted(comment), UPSCALERS.names());
    let text = page(PROTOCOL);
    let row = behind(PROTOCOL, &text, "| `hr_upscaler` |", "|");
    check(PROTOCOL, "upscalers", &quoted(row), UPSCALERS.names());
}

#[test]
fn pages_list_error_codes_that_exist() {
    let text = page(PROTOCOL);
    let list = behind(PROTOCOL, &text, "Codes are never reused:", "® has");
    check(PROTOCOL, "error codes", &quoted(list), Error::CODES.iter().copied());
    let text = page(README);
    for row in table(README, &text, "| code |") {
        for code in quoted(row.split('|').nth(1).unwrap()) {
            assert!(Error::CODES.contains(&code), "{README} lists the error code `{code}`, which does not exist");
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
