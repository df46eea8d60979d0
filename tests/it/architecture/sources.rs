//! The Rust sources as the rules see them: comments and literals are blanked, so that only code counts.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A source file. `code` has the same lines as `text`, with spaces for comments and literals.
pub(super) struct Source {
    /// Relative to the repository's root, with `/`.
    pub(super) path: String,
    pub(super) text: String,
    pub(super) code: String,
    /// `code` without inline test modules.
    pub(super) production: String,
}

impl Source {
    fn new(path: String, text: String) -> Self {
        let code = blank(&text);
        let production = without_tests(&code);
        Self { path, text, code, production }
    }

    /// The 1-based line of a byte of `code`.
    pub(super) fn line(&self, offset: usize) -> usize {
        line_of(&self.code, offset)
    }

    /// The folders and the file under `src`, without `.rs`; `mod` is left out.
    pub(super) fn module(&self) -> Vec<String> {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        let mut parts: Vec<String> = path.split('/').map(str::to_owned).collect();
        if parts.last().is_some_and(|last| last == "mod") {
            parts.pop();
        }
        parts
    }

    pub(super) fn is_crate_root(&self) -> bool {
        matches!(self.path.as_str(), "src/lib.rs" | "src/main.rs")
    }
}

pub(super) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every `.rs` file under `src`.
pub(super) fn production() -> &'static [Source] {
    static SOURCES: OnceLock<Vec<Source>> = OnceLock::new();
    SOURCES.get_or_init(|| read("src"))
}

/// Every `.rs` file under `tests` and `benches`.
pub(super) fn tests() -> &'static [Source] {
    static SOURCES: OnceLock<Vec<Source>> = OnceLock::new();
    SOURCES.get_or_init(|| [read("tests"), read("benches")].into_iter().flatten().collect())
}

fn read(folder: &str) -> Vec<Source> {
    files(folder)
        .into_iter()
        .filter(|path| path.ends_with(".rs"))
        .map(|path| {
            let text = fs::read_to_string(root().join(&path)).unwrap();
            Source::new(path, text)
        })
        .collect()
}

/// All files under a folder, relative to the repository's root, sorted.
pub(super) fn files(folder: &str) -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    assert!(!found.is_empty(), "no files under `{folder}`");
    let relative = |path: PathBuf| path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
    let mut found: Vec<String> = found.into_iter().map(relative).collect();
    found.sort();
    found
}

pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

pub(super) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every identifier and keyword, with its offset.
pub(super) fn identifiers(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut rest = 0;
    std::iter::from_fn(move || {
        let start = rest + code[rest..].find(is_word)?;
        let end = code[start..].find(|c| !is_word(c)).map_or(code.len(), |length| start + length);
        rest = end;
        Some((start, &code[start..end]))
    })
    .filter(|(_, word)| !word.starts_with(|c: char| c.is_ascii_digit()))
}

/// The offset behind the brace that closes the one at `open`.
pub(super) fn matching_brace(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

fn without_tests(code: &str) -> String {
    let mut production = code.as_bytes().to_vec();
    for (at, attribute) in code.match_indices("#[cfg(test)]") {
        let behind = at + attribute.len();
        let rest = &code[behind..];
        let open = rest.find(['{', ';']).filter(|open| rest[*open..].starts_with('{'));
        let Some(open) = open.filter(|_| rest.trim_start().starts_with("mod ")) else { continue };
        let module = behind..matching_brace(code, behind + open);
        production[module].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
    }
    String::from_utf8(production).unwrap()
}

/// The text with spaces for every comment, string and character literal.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let range = literal_or_comment(bytes, at);
        let Some(range) = range else {
            at += 1;
            continue;
        };
        out[range.clone()].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        at = range.end;
    }
    String::from_utf8(out).unwrap()
}

/// What begins at `at`, if it is a comment or a literal.
fn literal_or_comment(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = &bytes[at..];
    let end = match rest {
        [b'/', b'/', ..] => rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        [b'"', ..] => string(rest),
        [b'r', b'"' | b'#', ..] if at == 0 || !is_word(char::from(bytes[at - 1])) || bytes[at - 1] == b'b' => {
            raw_string(rest)?
        }
        [b'\'', b'\\', ..] => 3 + rest.get(3..)?.iter().position(|byte| *byte == b'\'')?,
        [b'\'', first, ..] => {
            // A lifetime has no closing quote behind its first character.
            let length = match first {
                0..0x80 => 1,
                0x80..0xe0 => 2,
                0xe0..0xf0 => 3,
                _ => 4,
            };
            (rest.get(1 + length) == Some(&b'\'')).then_some(1 + length)?
        }
        _ => return None,
    };
    // A character literal's end is its closing quote.
    let end = if rest[0] == b'\'' { end + 1 } else { end };
    Some(at..(at + end).min(bytes.len()))
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at + 1 < rest.len() {
        match &rest[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn string(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_string(rest: &[u8]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
    // `r#type` is an identifier.
    (rest.get(1 + hashes) == Some(&b'"')).then_some(())?;
    let close = [&b"\""[..], &b"#".repeat(hashes)].concat();
    let body = 2 + hashes;
    let length = rest[body..].windows(close.len()).position(|window| window == close);
    Some(length.map_or(rest.len(), |length| body + length + close.len()))
}

#[test]
fn comments_and_literals_are_blanked() {
    let cases = [
        ("a // b\nc", "a     \nc"),
        ("a /* b /* c */ d */ e", "a                   e"),
        (r#"f("x\"y", 'z', '\'', b"w")"#, "f(      ,    ,     , b   )"),
        (r##"f(r#"a"b"#, r"c")"##, "f(        ,     )"),
        ("fn f<'a>(x: &'a str) -> r#type", "fn f<'a>(x: &'a str) -> r#type"),
        ("'ü' '\\u{1F600}' 'static", "                 'static"),
    ];
    for (text, expected) in cases {
        assert_eq!(blank(text), expected, "{text}");
    }
}
