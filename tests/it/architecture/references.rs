//! Files that pages and comments refer to must exist: paths in backticks, and the targets of relative links.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::assert_none;
use super::sources::{files, production, root, tests};

const FOLDERS: [&str; 9] =
    ["src/", "tests/", "benches/", "configs/", "assets/", "docs/", "examples/", ".ci/", ".github/"];

/// Parts of a path that stand for any name, in instructions.
const PLACEHOLDERS: [&str; 2] = ["NAME", "DOMAIN"];

#[test]
fn paths_in_backticks_exist() {
    let known = repository();
    let mut wrong = Vec::new();
    let pages = pages();
    let sources = production().iter().chain(tests()).map(|source| (&source.path, comments(&source.text)));
    for (path, text) in pages.iter().map(|(path, text)| (path, text.clone())).chain(sources) {
        for (line, word) in quoted(&text) {
            if is_path(word) && !exists(word, &known) {
                let cure = "name the file that has it now";
                let message = format!("{path}:{line} names `{word}`, which does not exist: {cure}");
                wrong.push(message);
            }
        }
    }
    assert_none(wrong);
}

#[test]
fn targets_of_relative_links_exist() {
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        let folder = Path::new(&path).parent().unwrap();
        for (line, target) in links(&text) {
            if !root().join(folder).join(target).exists() {
                let message = format!("{path}:{line} links to `{target}`, which does not exist: link to its new place");
                wrong.push(message);
            }
        }
    }
    assert_none(wrong);
}

/// The relative targets of links and images outside code, without anchors, each with its line.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut is_code = false;
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        }
        if is_code {
            continue;
        }
        let targets = line.split("](").skip(1).filter_map(|rest| rest.split([')', ' ', '#']).next());
        found.extend(
            targets.filter(|target| !target.is_empty() && !target.contains(':')).map(|target| (at + 1, target)),
        );
    }
    found
}

/// Markdown for people, with its path.
fn pages() -> Vec<(String, String)> {
    let top = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let folders = ["src", "docs"].into_iter().filter(|folder| root().join(folder).exists()).flat_map(files);
    let pages = top.chain(folders).filter(|path| path.ends_with(".md"));
    pages.map(|path| (path.clone(), fs::read_to_string(root().join(&path)).unwrap())).collect()
}

/// Every file of the repository that a page or comment may name.
fn repository() -> BTreeSet<String> {
    let folders = FOLDERS.iter().filter(|folder| root().join(folder).exists());
    let mut known: BTreeSet<String> = folders.flat_map(|folder| files(folder.trim_end_matches('/'))).collect();
    known.extend(fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()));
    known
}

/// The comments of a source file, line by line; other lines are empty.
fn comments(text: &str) -> String {
    let comment = |line: &str| line.find("//").map_or(String::new(), |at| line[at..].to_owned());
    text.lines().map(comment).collect::<Vec<_>>().join("\n")
}

/// What stands in backticks, with its line.
fn quoted(text: &str) -> Vec<(usize, &str)> {
    let lines = text.lines().enumerate();
    lines.flat_map(|(at, line)| line.split('`').skip(1).step_by(2).map(move |word| (at + 1, word))).collect()
}

/// True if a word names a file of this repository: it begins with one of its folders, or ends as sources and pages do.
fn is_path(word: &str) -> bool {
    let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let named = [".rs", ".md"].iter().any(|end| word.len() > end.len() && word.ends_with(end));
    let is_pattern = word.split(['/', '.']).any(|part| PLACEHOLDERS.contains(&part));
    plain && !is_pattern && (FOLDERS.iter().any(|folder| word.starts_with(folder)) || named)
}

/// True if a file or folder of the repository has the path, or one that ends with it.
fn exists(word: &str, known: &BTreeSet<String>) -> bool {
    let word = word.trim_end_matches('/');
    let (tail, folder) = (format!("/{word}"), format!("{word}/"));
    known.iter().any(|path| path == word || path.ends_with(&tail) || path.starts_with(&folder))
}

#[test]
fn paths_differ_from_other_words() {
    for (word, expected) in [
        ("src/lib.rs", true),
        ("lora/keys/mod.rs", true),
        ("tests/goldens/", true),
        ("owner/name", false),
        ("unet/config.json", false),
        ("src/*.rs", false),
        ("src/DOMAIN/workers/NAME.rs", false),
        (".rs", false),
    ] {
        assert_eq!(is_path(word), expected, "{word}");
    }
}

#[test]
fn relative_links_are_found() {
    let text = "[a](b.md), ![c](d/e.png) [f](https://g.org) [h](#i)\n```\n[j](k.md)\n```\n[l](../m.md#n)";
    assert_eq!(links(text), [(1, "b.md"), (1, "d/e.png"), (5, "../m.md")]);
}
