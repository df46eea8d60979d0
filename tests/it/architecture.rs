//! The design's rules, checked against the source tree. A violation names the file, the line or length, and the cure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod exceptions;
mod imports;
mod layers;
mod length;
mod pages;
mod references;
mod sources;
mod words;

use std::collections::BTreeSet;

/// A broken rule: the key by which an exception names it, and a message with the cure.
struct Violation {
    key: String,
    message: String,
}

impl Violation {
    fn new(key: impl Into<String>, message: String) -> Self {
        Self { key: key.into(), message }
    }
}

/// Fails for every violation that is no exception, and for every exception that nothing violates any more.
#[track_caller]
fn assert_none(violations: Vec<Violation>, exceptions: &[&str]) {
    let keys: BTreeSet<&str> = violations.iter().map(|violation| violation.key.as_str()).collect();
    let stale = exceptions.iter().filter(|exception| !keys.contains(*exception));
    let stale = stale.map(|exception| format!("`{exception}` violates the rule no more: remove the exception"));
    let fresh = violations.iter().filter(|violation| !exceptions.contains(&violation.key.as_str()));
    let wrong: Vec<String> = fresh.map(|violation| violation.message.clone()).chain(stale).collect();
    assert!(wrong.is_empty(), "{} violations:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
#[should_panic(expected = "`b` violates the rule no more")]
fn stale_exception_fails() {
    assert_none(vec![Violation::new("a", "a is wrong".to_owned())], &["a", "b"]);
}
