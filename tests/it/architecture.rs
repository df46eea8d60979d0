//! The design's rules, checked against the source tree. A violation names the file, the line or length, and the cure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod imports;
mod layers;
mod length;
mod pages;
mod references;
mod sources;
mod walkthrough;
mod words;

/// Fails with every message of a broken rule.
#[track_caller]
fn assert_none(violations: Vec<String>) {
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}
