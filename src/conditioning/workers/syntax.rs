//! The syntax of prompts, as AUTOMATIC1111's web UI defines it (`modules/prompt_parser.py`): attention in brackets,
//! escapes, `BREAK` and `AND`. Brackets that have no partner are read as there: one that opens reaches to the end, one
//! that closes is a character like any other.

use crate::error::{Error, Result};

/// What a pair of round brackets multiplies by, and a pair of square ones divides by.
const STEP: f64 = 1.1;
/// How deep brackets may nest.
pub(crate) const DEPTH: usize = 64;
/// Largest weight, of a word as of a part.
const MOST: f64 = 100.0;

/// A character, and which one of its field it is, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Glyph {
    pub(crate) c: char,
    pub(crate) at: usize,
}

/// Every character of `text`.
pub(crate) fn glyphs(text: &str) -> Vec<Glyph> {
    text.chars().enumerate().map(|(at, c)| Glyph { c, at }).collect()
}

/// One of the prompts that `AND` joins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) text: Vec<Glyph>,
    /// Its share in the guidance; `None` where none is written, which is 1.
    pub(crate) weight: Option<f64>,
}

/// Text of one weight, or the end of a chunk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fragment {
    Text { text: String, weight: f64 },
    Break,
}

/// Splits a prompt at the word `AND`. Where there is one, each part may end with a colon and its weight.
///
/// # Errors
/// `invalid_parameter` for a weight beyond ±100.
pub(crate) fn parts(text: &[Glyph], field: &str) -> Result<Vec<Part>> {
    let places = words(text, "AND");
    if places.is_empty() {
        return Ok(vec![Part { text: text.to_vec(), weight: None }]);
    }
    let mut parts = Vec::with_capacity(places.len() + 1);
    let mut start = 0;
    for end in places.iter().copied().chain([text.len()]) {
        parts.push(weighted(text.get(start..end).unwrap_or_default(), field)?);
        start = end + 3;
    }
    Ok(parts)
}

fn weighted(text: &[Glyph], field: &str) -> Result<Part> {
    let plain = || Ok(Part { text: text.to_vec(), weight: None });
    let Some(colon) = text.iter().rposition(|glyph| glyph.c == ':') else { return plain() };
    let spelled: String = text.iter().skip(colon + 1).map(|glyph| glyph.c).collect();
    let number = spelled.trim();
    let digits = number.trim_start_matches(['+', '-']);
    let sound = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
        && digits.ends_with(|c: char| c.is_ascii_digit() || c == '.');
    match number.parse::<f64>() {
        Ok(weight) if sound => {
            let at = text.get(colon).map_or(0, |glyph| glyph.at + 1);
            bounded(weight, at, field)?;
            let end = text.iter().take(colon).rposition(|glyph| !glyph.c.is_whitespace()).map_or(0, |last| last + 1);
            Ok(Part { text: text.get(..end).unwrap_or_default().to_vec(), weight: Some(weight) })
        }
        _ => plain(),
    }
}

/// A fault at character `at`, which people count from 1.
pub(crate) fn fault(field: &str, at: usize, what: impl std::fmt::Display) -> Error {
    Error::invalid(field, format!("has {what} at character {}", at + 1))
}

fn bounded(weight: f64, at: usize, field: &str) -> Result<()> {
    if weight.abs() <= MOST {
        return Ok(());
    }
    Err(fault(field, at, format_args!("the weight {weight}, and {MOST} is the most either way,")))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands as a word of its own.
fn words(text: &[Glyph], word: &str) -> Vec<usize> {
    let length = word.chars().count();
    let stands = |&start: &usize| {
        let outside = |at: Option<usize>| at.and_then(|at| text.get(at)).is_none_or(|glyph| !is_word(glyph.c));
        text.iter().skip(start).map(|glyph| glyph.c).take(length).eq(word.chars())
            && outside(start.checked_sub(1))
            && outside(Some(start + length))
    };
    (0..text.len().saturating_sub(length - 1)).filter(stands).collect()
}

/// Text under construction: fragments, and where the brackets that are open now began.
#[derive(Default)]
struct Reader {
    fragments: Vec<(Fragment, usize)>,
    round: Vec<usize>,
    square: Vec<usize>,
}

impl Reader {
    fn text(&mut self, text: String, at: usize) {
        self.fragments.push((Fragment::Text { text, weight: 1.0 }, at));
    }

    fn multiply(&mut self, start: usize, factor: f64) {
        for (fragment, _) in self.fragments.iter_mut().skip(start) {
            if let Fragment::Text { weight, .. } = fragment {
                *weight *= factor;
            }
        }
    }

    /// A run without brackets, which `BREAK` may divide.
    fn run(&mut self, run: &[Glyph]) {
        let mut start = 0;
        for place in words(run, "BREAK") {
            let before: String = run.get(start..place).unwrap_or_default().iter().map(|glyph| glyph.c).collect();
            self.text(before.trim_end().to_owned(), run.get(start).map_or(0, |glyph| glyph.at));
            self.fragments.push((Fragment::Break, 0));
            start = place + 5;
            start += run.iter().skip(start).take_while(|glyph| glyph.c.is_whitespace()).count();
        }
        let rest: String = run.iter().skip(start).map(|glyph| glyph.c).collect();
        self.text(rest, run.get(start).map_or(0, |glyph| glyph.at));
    }
}

/// The fragments of a text. Neighbours of the same weight are one.
///
/// # Errors
/// `invalid_parameter`, with the character, for a weight that is no number or lies beyond ±100, and for brackets that
/// nest too deep.
pub(crate) fn attention(text: &[Glyph], field: &str) -> Result<Vec<Fragment>> {
    let mut reader = Reader::default();
    let mut i = 0;
    while let Some(&Glyph { c, at }) = text.get(i) {
        let mut next = i + 1;
        match c {
            '\\' => {
                let escaped = text.get(next).filter(|glyph| "()[]\\".contains(glyph.c));
                if let Some(glyph) = escaped {
                    reader.text(glyph.c.to_string(), at);
                    next += 1;
                }
            }
            '(' | '[' if reader.round.len() + reader.square.len() >= DEPTH => {
                return Err(fault(field, at, format_args!("brackets that nest deeper than {DEPTH}")));
            }
            '(' => reader.round.push(reader.fragments.len()),
            '[' => reader.square.push(reader.fragments.len()),
            ')' if !reader.round.is_empty() => {
                let start = reader.round.pop().unwrap_or_default();
                reader.multiply(start, STEP);
            }
            ']' if !reader.square.is_empty() => {
                let start = reader.square.pop().unwrap_or_default();
                reader.multiply(start, 1.0 / STEP);
            }
            ':' => match number(text, i) {
                Some((spelled, end)) if !reader.round.is_empty() => {
                    let weight: f64 = spelled
                        .parse()
                        .map_err(|_| fault(field, at + 1, format_args!("a weight that is no number, `{spelled}`,")))?;
                    bounded(weight, at + 1, field)?;
                    let start = reader.round.pop().unwrap_or_default();
                    reader.multiply(start, weight);
                    next = end;
                }
                found => {
                    next = found.map_or(next, |(_, end)| end);
                    let literal = text.get(i..next).unwrap_or_default().iter().map(|glyph| glyph.c).collect();
                    reader.text(literal, at);
                }
            },
            ')' | ']' => reader.text(c.to_string(), at),
            _ => {
                next += text.iter().skip(next).take_while(|glyph| !"\\()[]:".contains(glyph.c)).count();
                reader.run(text.get(i..next).unwrap_or_default());
            }
        }
        i = next;
    }
    for start in std::mem::take(&mut reader.round) {
        reader.multiply(start, STEP);
    }
    for start in std::mem::take(&mut reader.square) {
        reader.multiply(start, 1.0 / STEP);
    }
    merged(reader.fragments, field)
}

/// A text whose escaped characters stand for themselves.
pub(crate) fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '\\' => plain.extend(characters.next_if(|&next| "()[]\\".contains(next))),
            _ => plain.push(c),
        }
    }
    plain
}

/// `:1.2)` at `colon`: the number as it is spelled, and where the text goes on.
fn number(text: &[Glyph], colon: usize) -> Option<(String, usize)> {
    let blank = |from: usize| from + text.iter().skip(from).take_while(|glyph| glyph.c.is_whitespace()).count();
    let start = blank(colon + 1);
    let signed = start + usize::from(text.get(start).is_some_and(|glyph| matches!(glyph.c, '+' | '-')));
    let end = signed + text.iter().skip(signed).take_while(|glyph| glyph.c.is_ascii_digit() || glyph.c == '.').count();
    let close = blank(end);
    let closed = end > signed && text.get(close).is_some_and(|glyph| glyph.c == ')');
    closed.then(|| (text.get(start..end).unwrap_or_default().iter().map(|glyph| glyph.c).collect(), close + 1))
}

fn merged(fragments: Vec<(Fragment, usize)>, field: &str) -> Result<Vec<Fragment>> {
    let mut merged: Vec<Fragment> = Vec::with_capacity(fragments.len());
    for (fragment, at) in fragments {
        if let Fragment::Text { text, weight } = &fragment {
            bounded(*weight, at, field)?;
            if let Some(Fragment::Text { text: before, weight: same }) = merged.last_mut()
                && same == weight
            {
                before.push_str(text);
                continue;
            }
        }
        merged.push(fragment);
    }
    if merged.is_empty() {
        merged.push(Fragment::Text { text: String::new(), weight: 1.0 });
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::{Fragment, attention, glyphs, parts};

    /// Weights to nine digits, as the factors are multiplied in one order or another.
    fn check(text: &str, expected: &[(&str, f64)]) {
        let got: Vec<(String, f64)> = attention(&glyphs(text), "prompt")
            .unwrap()
            .into_iter()
            .map(|fragment| match fragment {
                Fragment::Text { text, weight } => (text, (weight * 1e9).round() / 1e9),
                Fragment::Break => ("BREAK".to_owned(), -1.0),
            })
            .collect();
        let expected: Vec<(String, f64)> =
            expected.iter().map(|(text, weight)| ((*text).to_owned(), (weight * 1e9).round() / 1e9)).collect();
        assert_eq!(got, expected, "{text}");
    }

    #[test]
    fn brackets_weigh_as_the_web_ui_documents() {
        check("normal text", &[("normal text", 1.0)]);
        check("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]);
        check("(unbalanced", &[("unbalanced", 1.1)]);
        check(r"\(literal\]", &[("(literal]", 1.0)]);
        check("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]);
        check(
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            &[
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        );
    }

    #[test]
    fn what_has_no_partner_is_read_as_the_web_ui_reads_it() {
        check("", &[("", 1.0)]);
        check("()", &[("", 1.0)]);
        check("a) b]", &[("a) b]", 1.0)]);
        check("a :1.2) b", &[("a :1.2) b", 1.0)]);
        check("16:9", &[("16:9", 1.0)]);
        check("(a:b)", &[("a:b", 1.1)]);
        check("[[faint", &[("faint", 1.0 / 1.21)]);
        check(r"back\slash \\ \", &[(r"backslash \ ", 1.0)]);
        check("(a: 1.5 )", &[("a", 1.5)]);
        check("(a:-.5)(b:+2.)", &[("a", -0.5), ("b", 2.0)]);
        check("(a:0)", &[("a", 0.0)]);
        check("(a [b] c)", &[("a ", 1.1), ("b", 1.0), (" c", 1.1)]);
        check("(ä😀:2)", &[("ä😀", 2.0)]);
    }

    #[test]
    fn break_ends_a_chunk_also_within_brackets() {
        check("a BREAK b", &[("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]);
        check("BREAKFAST in an OUTBREAK", &[("BREAKFAST in an OUTBREAK", 1.0)]);
        check("BREAK", &[("", 1.0), ("BREAK", -1.0), ("", 1.0)]);
        check("(a BREAK b:2)", &[("a", 2.0), ("BREAK", -1.0), ("b", 2.0)]);
    }

    fn check_fault(text: &str, character: &str) {
        let glyphs = glyphs(text);
        let made = parts(&glyphs, "prompt")
            .and_then(|parts| parts.iter().map(|part| attention(&part.text, "prompt")).collect::<Result<Vec<_>, _>>());
        let error = made.unwrap_err();
        assert_eq!(error.code(), "invalid_parameter");
        assert!(error.to_string().ends_with(character), "{text}: {error}");
    }

    #[test]
    fn a_fault_points_at_its_character() {
        check_fault("a (word:1.2.3) b", "at character 9");
        check_fault("é (😀:..)", "at character 6");
        check_fault("(a:101)", "at character 4");
        check_fault("(a:1e9) (b:9999999)", "at character 12");
        check_fault(&format!("{}deep", "(".repeat(60)), "at character 61");
        check_fault("a AND b :200", "at character 10");
        check_fault(&format!("é {}deep", "([".repeat(40)), "at character 67");
        check_fault(&"()[".repeat(70), "at character 193");
        assert!(attention(&glyphs(&"([".repeat(32)), "prompt").is_ok());
    }

    fn check_parts(text: &str, expected: &[(&str, Option<f64>)]) {
        let made = parts(&glyphs(text), "prompt").unwrap();
        let got: Vec<(String, Option<f64>)> =
            made.iter().map(|part| (part.text.iter().map(|glyph| glyph.c).collect(), part.weight)).collect();
        let expected: Vec<(String, Option<f64>)> = expected.iter().map(|(text, w)| ((*text).to_owned(), *w)).collect();
        assert_eq!(got, expected, "{text}");
    }

    #[test]
    fn the_word_and_joins_parts_with_weights() {
        check_parts("a cat", &[("a cat", None)]);
        check_parts("ratio 16:9", &[("ratio 16:9", None)]);
        check_parts("a cat AND a dog", &[("a cat ", None), (" a dog", None)]);
        check_parts("a :1.2 AND b", &[("a", Some(1.2)), (" b", None)]);
        check_parts("a AND b:-0.5 ", &[("a ", None), (" b", Some(-0.5))]);
        check_parts("a AND (b:1.3)", &[("a ", None), (" (b:1.3)", None)]);
        check_parts("SAND ANDROID a_AND", &[("SAND ANDROID a_AND", None)]);
        check_parts("AND", &[("", None), ("", None)]);
    }
}
