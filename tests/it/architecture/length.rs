//! How long files and functions may be, how a file opens, and over how many files a type is spread.

use std::collections::{BTreeMap, BTreeSet};

use super::assert_none;
use super::imports::{file_of, imports};
use super::sources::{Source, identifiers, is_word, matching_brace, production, tests};

const FUNCTION: usize = 60;
const FILE: usize = 500;
/// Of networks and kernels, which follow a paper or an instruction set from top to bottom.
const LONG_FILE: usize = 800;
/// Over which the inherent `impl` blocks of a type may be spread.
const FILES_OF_A_TYPE: usize = 2;

#[test]
fn files_open_with_their_responsibility_and_are_short() {
    let mut wrong = Vec::new();
    for source in production().iter().chain(tests()) {
        let path = &source.path;
        if !source.text.starts_with("//!") {
            wrong.push(format!("{path} does not open with `//!`: say what it is responsible for"));
        }
        let limit = if path.contains("/networks/") || path.contains("/kernels/") { LONG_FILE } else { FILE };
        let lines = source.text.lines().count();
        if lines > limit {
            let message = format!("{path} has {lines} lines, {limit} are allowed: give a part a file of its own");
            wrong.push(message);
        }
    }
    assert_none(wrong);
}

#[test]
fn functions_are_short() {
    let mut wrong = Vec::new();
    for source in production() {
        for Function { name, line, lines } in functions(source) {
            if lines > FUNCTION {
                let path = &source.path;
                let cure = "make its steps functions with names";
                let message = format!("{path}:{line} `{name}` has {lines} lines, {FUNCTION} are allowed: {cure}");
                wrong.push(message);
            }
        }
    }
    assert_none(wrong);
}

struct Function<'a> {
    name: &'a str,
    line: usize,
    /// From `fn` to the closing brace.
    lines: usize,
}

/// The functions of a file that have a body.
fn functions(source: &Source) -> Vec<Function<'_>> {
    let code = source.code.as_str();
    let mut words = identifiers(code).peekable();
    let mut found = Vec::new();
    while let Some((start, word)) = words.next() {
        // `fn(…)` is a type.
        let Some(&(at, name)) = words.peek().filter(|(at, _)| word == "fn" && code[start + 2..*at].trim().is_empty())
        else {
            continue;
        };
        let Some(open) = body(code, at) else { continue };
        let line = source.line(start);
        found.push(Function { name, line, lines: source.line(matching_brace(code, open) - 1) - line + 1 });
    }
    found
}

/// The brace that opens a function's body; `None` if it ends with a semicolon. `[f32; 4]` in a signature is no end.
fn body(code: &str, from: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, byte) in code.bytes().enumerate().skip(from) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth -= 1,
            b'{' if depth == 0 => return Some(at),
            b';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

#[test]
fn no_module_is_named_for_nothing() {
    let mut wrong = Vec::new();
    for source in production().iter().chain(tests()) {
        for name in source.module() {
            if ["utils", "util", "common", "helpers", "types", "misc"].contains(&name.as_str()) {
                let message = format!("{} is named `{name}`: name it for what it is responsible for", source.path);
                wrong.push(message);
            }
        }
    }
    assert_none(wrong);
}

#[test]
fn a_type_is_implemented_in_few_files() {
    let defined = definitions();
    let mut files: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for source in production() {
        let imported = imports(source);
        for name in inherent_impls(&source.production) {
            let Some(homes) = defined.get(name) else { continue };
            let home = homes.iter().copied().find(|home| *home == source.path || homes.len() == 1).or_else(|| {
                let import = imported.iter().find(|import| import.path.last().is_some_and(|last| last == name))?;
                file_of(&import.path)
            });
            files.entry((home.unwrap_or_default(), name)).or_default().insert(&source.path);
        }
    }
    let spread = files.into_iter().filter(|(_, files)| files.len() > FILES_OF_A_TYPE);
    let describe = |((home, name), files): ((&str, &str), BTreeSet<&str>)| {
        let files = Vec::from_iter(files).join(", ");
        let cure = "split the type, or make the methods functions of what they use";
        let message = format!("`{name}` of {home} has `impl` blocks in {files}; {FILES_OF_A_TYPE} are allowed: {cure}");
        message
    };
    assert_none(spread.map(describe).collect());
}

/// The files of `src` that define a type of a name.
pub(super) fn definitions() -> BTreeMap<String, Vec<&'static str>> {
    let mut found: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    for source in production() {
        let mut words = identifiers(&source.production).peekable();
        while let Some((_, word)) = words.next() {
            if matches!(word, "struct" | "enum" | "union") {
                let Some(&(_, name)) = words.peek() else { break };
                // `union` is a name, too.
                if name.starts_with(char::is_uppercase) {
                    found.entry(name.to_owned()).or_default().push(&source.path);
                }
            }
        }
    }
    found
}

/// The names of types in `impl Type` without a trait.
fn inherent_impls(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for line in code.lines() {
        let Some(rest) = line.strip_prefix("impl").or_else(|| line.strip_prefix("unsafe impl")) else { continue };
        if rest.starts_with(is_word) || rest.contains(" for ") {
            continue;
        }
        let rest = behind_generics(rest).trim_start();
        let end = rest.find(|c: char| !is_word(c) && c != ':').unwrap_or(rest.len());
        found.extend(rest[..end].rsplit("::").next().filter(|name| !name.is_empty()));
    }
    found
}

/// The text behind `<…>`, if it opens with it.
fn behind_generics(text: &str) -> &str {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '<' => depth += 1,
            '>' if !text[..at].ends_with('-') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return if c == '>' { &text[at + 1..] } else { text };
        }
    }
    text
}
