//! Paths that a source file names, with groups, `super` and `self` expanded to paths from the crate's root.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::sources::{Source, identifiers, is_word, matching_brace, production};

/// A path from the crate's root that a file names.
pub(super) struct Import {
    pub(super) path: Vec<String>,
    pub(super) line: usize,
}

impl Import {
    /// As it is written from another domain.
    pub(super) fn text(&self) -> String {
        format!("crate::{}", self.path.join("::"))
    }
}

/// Every path of production code that begins with `crate`, `super`, `self` or a child module.
pub(super) fn imports(source: &Source) -> Vec<Import> {
    let code = source.production.as_str();
    let inline = inline_modules(code);
    let children = children(&source.module());
    let mut found = Vec::new();
    for (at, word) in identifiers(code) {
        let is_first = !code[..at].trim_end().ends_with("::");
        let is_path = code[at + word.len()..].starts_with("::");
        if !is_first || !is_path {
            continue;
        }
        let child = children.contains(word);
        if !child && !matches!(word, "crate" | "super" | "self") {
            continue;
        }
        let mut module = source.module();
        module.extend(inline.iter().filter(|(range, _)| range.contains(&at)).map(|(_, name)| name.clone()));
        let mut paths = Vec::new();
        expand(&code[at..], "", &mut paths);
        let line = source.line(at);
        for path in paths {
            let path = if child { format!("self::{path}") } else { path };
            found.push(Import { path: absolute(&module, &path), line });
        }
    }
    found
}

/// The names of the modules whose files lie below a module.
fn children(module: &[String]) -> BTreeSet<&'static str> {
    production()
        .iter()
        .filter(|source| !source.is_crate_root())
        .filter_map(|source| {
            let path = source.path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
            let name = match module.is_empty() {
                true => path,
                false => path.strip_prefix(&module.join("/"))?.strip_prefix('/')?,
            };
            (!name.contains('/')).then_some(name)
        })
        .collect()
}

/// `mod name { … }` of a file, in order, outer ones first.
fn inline_modules(code: &str) -> Vec<(Range<usize>, String)> {
    let mut found = Vec::new();
    let mut words = identifiers(code).peekable();
    while let Some((_, word)) = words.next() {
        if word != "mod" {
            continue;
        }
        let Some(&(at, name)) = words.peek() else { break };
        let behind = &code[at + name.len()..];
        if behind.trim_start().starts_with('{') {
            let open = at + name.len() + behind.find('{').unwrap();
            found.push((open..matching_brace(code, open), name.to_owned()));
        }
    }
    found
}

/// Expands the use tree at the start of `text`, and gives its length.
fn expand(text: &str, prefix: &str, found: &mut Vec<String>) -> usize {
    let end = text.find(|c| !is_word(c) && c != ':').unwrap_or(text.len());
    let path = format!("{prefix}{}", &text[..end]);
    if !path.ends_with("::") || !text[end..].starts_with('{') {
        found.push(path.trim_end_matches(':').to_owned());
        return end;
    }
    let mut at = end + 1;
    loop {
        at += text[at..].find(|c: char| !c.is_whitespace() && c != ',').unwrap_or(text.len() - at);
        match text[at..].chars().next() {
            None => return at,
            Some('}') => return at + 1,
            Some(_) => at += expand(&text[at..], &path, found),
        }
        // `as name` and `*` belong to no path.
        at += text[at..].find([',', '}']).unwrap_or(text.len() - at);
    }
}

/// A path that begins with `crate`, `super` or `self`, from the crate's root.
fn absolute(module: &[String], path: &str) -> Vec<String> {
    let mut base = Vec::new();
    let mut parts = path.split("::").peekable();
    match parts.next() {
        Some("crate") => {}
        Some("super") => {
            let mut up = 1;
            while parts.next_if(|part| *part == "super").is_some() {
                up += 1;
            }
            base.extend_from_slice(&module[..module.len().saturating_sub(up)]);
        }
        _ => base.extend_from_slice(module),
    }
    base.extend(parts.filter(|part| *part != "self" && !part.is_empty()).map(str::to_owned));
    base
}

/// The file whose module is the longest beginning of a path.
pub(super) fn file_of(path: &[String]) -> Option<&'static str> {
    static FILES: std::sync::OnceLock<BTreeMap<Vec<String>, &'static str>> = std::sync::OnceLock::new();
    let files = FILES.get_or_init(|| {
        let sources = production().iter().filter(|source| !source.is_crate_root());
        sources.map(|source| (source.module(), source.path.as_str())).collect()
    });
    (1..=path.len()).rev().find_map(|length| files.get(&path[..length]).copied())
}

/// Files that import each other in a circle of more than `limit`, largest circle first.
pub(super) fn circles(limit: usize) -> Vec<Vec<&'static str>> {
    let mut edges: BTreeMap<&'static str, BTreeSet<&'static str>> = BTreeMap::new();
    for source in production().iter().filter(|source| !source.is_crate_root()) {
        let targets = imports(source).iter().filter_map(|import| file_of(&import.path)).collect::<BTreeSet<_>>();
        edges.entry(source.path.as_str()).or_default().extend(targets);
    }
    let mut found = components(&edges);
    found.retain(|circle| circle.len() > limit);
    found.sort_by_key(|circle| std::cmp::Reverse(circle.len()));
    found
}

/// Strongly connected components: nodes that reach each other.
fn components<'a>(edges: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Vec<Vec<&'a str>> {
    let reach = |start: &'a str| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
        while let Some(node) = open.pop() {
            let next = edges.get(node).into_iter().flatten();
            open.extend(next.filter(|next| seen.insert(**next)));
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> = edges.keys().map(|node| (*node, reach(node))).collect();
    let mut found = BTreeSet::new();
    for (node, targets) in &reached {
        found.insert(
            targets.iter().copied().filter(|to| reached.get(to).is_some_and(|back| back.contains(node))).collect(),
        );
    }
    found.into_iter().collect()
}

#[test]
fn nested_groups_are_expanded() {
    let cases: [(&str, &[&str]); 5] = [
        ("crate::a::B;", &["crate::a::B"]),
        ("crate::{a::B, c::{D, E as F}, g};", &["crate::a::B", "crate::c::D", "crate::c::E", "crate::g"]),
        ("super::a::{self, B};", &["super::a::self", "super::a::B"]),
        ("crate::a::*;", &["crate::a"]),
        ("crate::{\n    a,\n    b::{\n        C,\n    },\n}", &["crate::a", "crate::b::C"]),
    ];
    for (text, expected) in cases {
        let mut found = Vec::new();
        expand(text, "", &mut found);
        assert_eq!(found, expected, "{text}");
    }
}

#[test]
fn relative_paths_become_absolute() {
    let module = ["model", "lora", "keys"].map(str::to_owned);
    let cases = [
        ("crate::units::Bytes", "units::Bytes"),
        ("super::lookup::find", "model::lora::lookup::find"),
        ("super::super::hub", "model::hub"),
        ("self::parse::Key", "model::lora::keys::parse::Key"),
        ("super::merge::self", "model::lora::merge"),
    ];
    for (path, expected) in cases {
        assert_eq!(absolute(&module, path).join("::"), expected, "{path}");
    }
}

#[test]
fn a_circle_is_every_file_that_reaches_itself_through_the_others() {
    let edges = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("e", "e")];
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (from, to) in edges {
        graph.entry(from).or_default().insert(to);
    }
    let circles: Vec<Vec<&str>> = components(&graph).into_iter().filter(|circle| circle.len() > 1).collect();
    assert_eq!(circles, [["a", "b", "c"]]);
}
