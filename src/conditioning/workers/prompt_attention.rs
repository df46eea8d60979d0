//! Parses `(word:1.2)`, `[word]`, escapes, `BREAK` and `AND` as AUTOMATIC1111 does (`modules/prompt_parser.py`). An
//! opening bracket without a partner reaches to the end of the prompt; a closing one is plain text.

use crate::error::{Error, Result};

/// Round brackets multiply the weight by this factor, square brackets divide by it.
const BRACKET_FACTOR: f64 = 1.1;
/// Deepest nesting of brackets.
pub(crate) const MAX_DEPTH: usize = 64;
/// Largest weight of a word or subprompt.
const MAX_WEIGHT: f64 = 100.0;

/// A character and its index in the request field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PromptChar {
    pub(crate) c: char,
    pub(crate) index: usize,
}

/// The characters of `text`.
pub(crate) fn prompt_chars(text: &str) -> Vec<PromptChar> {
    text.chars().enumerate().map(|(index, c)| PromptChar { c, index }).collect()
}

/// One of the prompts that `AND` joins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Subprompt {
    pub(crate) text: Vec<PromptChar>,
    /// Its share in the guidance; `None` if the prompt gives none, which means 1.
    pub(crate) weight: Option<f64>,
}

/// Text of one weight, or the end of a chunk (`BREAK`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fragment {
    Text { text: String, weight: f64 },
    Break,
}

/// Splits a prompt at the word `AND`; each part may then end with a colon and its weight.
///
/// # Errors
/// `invalid_parameter` for a weight beyond ±100.
pub(crate) fn subprompts(text: &[PromptChar], field: &str) -> Result<Vec<Subprompt>> {
    let positions = find_word(text, "AND");
    if positions.is_empty() {
        return Ok(vec![Subprompt { text: text.to_vec(), weight: None }]);
    }
    let mut subprompts = Vec::with_capacity(positions.len() + 1);
    let mut start = 0;
    for end in positions.iter().copied().chain([text.len()]) {
        subprompts.push(parse_subprompt(text.get(start..end).unwrap_or_default(), field)?);
        start = end + 3;
    }
    Ok(subprompts)
}

fn parse_subprompt(text: &[PromptChar], field: &str) -> Result<Subprompt> {
    let plain = || Ok(Subprompt { text: text.to_vec(), weight: None });
    let Some(colon) = text.iter().rposition(|character| character.c == ':') else { return plain() };
    let literal: String = text.iter().skip(colon + 1).map(|character| character.c).collect();
    let number = literal.trim();
    let digits = number.trim_start_matches(['+', '-']);
    let is_decimal = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
        && digits.ends_with(|c: char| c.is_ascii_digit() || c == '.');
    match number.parse::<f64>() {
        Ok(weight) if is_decimal => {
            let index = text.get(colon).map_or(0, |character| character.index + 1);
            check_weight(weight, index, field)?;
            let end =
                text.iter().take(colon).rposition(|character| !character.c.is_whitespace()).map_or(0, |last| last + 1);
            Ok(Subprompt { text: text.get(..end).unwrap_or_default().to_vec(), weight: Some(weight) })
        }
        _ => plain(),
    }
}

/// An error at the character `index`; messages count from 1.
pub(crate) fn error_at(field: &str, index: usize, what: impl std::fmt::Display) -> Error {
    Error::invalid(field, format!("has {what} at character {}", index + 1))
}

fn check_weight(weight: f64, index: usize, field: &str) -> Result<()> {
    if weight.abs() <= MAX_WEIGHT {
        return Ok(());
    }
    Err(error_at(field, index, format_args!("the weight {weight}, and {MAX_WEIGHT} is the most either way,")))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Positions of `word` where it is not part of a longer word.
fn find_word(text: &[PromptChar], word: &str) -> Vec<usize> {
    let length = word.chars().count();
    let is_whole = |&start: &usize| {
        let outside = |at: Option<usize>| at.and_then(|at| text.get(at)).is_none_or(|character| !is_word(character.c));
        text.iter().skip(start).map(|character| character.c).take(length).eq(word.chars())
            && outside(start.checked_sub(1))
            && outside(Some(start + length))
    };
    (0..text.len().saturating_sub(length - 1)).filter(is_whole).collect()
}

/// The fragments so far, and for each open bracket the index of its first fragment.
#[derive(Default)]
struct AttentionParser {
    fragments: Vec<(Fragment, usize)>,
    round: Vec<usize>,
    square: Vec<usize>,
}

impl AttentionParser {
    fn text(&mut self, text: String, index: usize) {
        self.fragments.push((Fragment::Text { text, weight: 1.0 }, index));
    }

    fn multiply(&mut self, start: usize, factor: f64) {
        for (fragment, _) in self.fragments.iter_mut().skip(start) {
            if let Fragment::Text { weight, .. } = fragment {
                *weight *= factor;
            }
        }
    }

    /// Adds text without brackets, which `BREAK` may divide.
    fn plain_text(&mut self, run: &[PromptChar]) {
        let mut start = 0;
        for position in find_word(run, "BREAK") {
            let before: String =
                run.get(start..position).unwrap_or_default().iter().map(|character| character.c).collect();
            self.text(before.trim_end().to_owned(), run.get(start).map_or(0, |character| character.index));
            self.fragments.push((Fragment::Break, 0));
            start = position + 5;
            start += run.iter().skip(start).take_while(|character| character.c.is_whitespace()).count();
        }
        let rest: String = run.iter().skip(start).map(|character| character.c).collect();
        self.text(rest, run.get(start).map_or(0, |character| character.index));
    }
}

/// Splits a text into fragments, merging neighbours of the same weight.
///
/// # Errors
/// `invalid_parameter`, with the character, for a weight that is not a number within ±100, and for brackets that
/// nest too deep.
pub(crate) fn parse_attention(text: &[PromptChar], field: &str) -> Result<Vec<Fragment>> {
    let mut parser = AttentionParser::default();
    let mut i = 0;
    while let Some(&PromptChar { c, index }) = text.get(i) {
        let mut next = i + 1;
        match c {
            '\\' => {
                let escaped = text.get(next).filter(|character| "()[]\\".contains(character.c));
                if let Some(character) = escaped {
                    parser.text(character.c.to_string(), index);
                    next += 1;
                }
            }
            '(' | '[' if parser.round.len() + parser.square.len() >= MAX_DEPTH => {
                return Err(error_at(field, index, format_args!("brackets that nest deeper than {MAX_DEPTH}")));
            }
            '(' => parser.round.push(parser.fragments.len()),
            '[' => parser.square.push(parser.fragments.len()),
            ')' if !parser.round.is_empty() => {
                let start = parser.round.pop().unwrap_or_default();
                parser.multiply(start, BRACKET_FACTOR);
            }
            ']' if !parser.square.is_empty() => {
                let start = parser.square.pop().unwrap_or_default();
                parser.multiply(start, 1.0 / BRACKET_FACTOR);
            }
            ':' => match parse_weight(text, i) {
                Some((literal, end)) if !parser.round.is_empty() => {
                    let weight: f64 = literal.parse().map_err(|_| {
                        error_at(field, index + 1, format_args!("a weight that is no number, `{literal}`,"))
                    })?;
                    check_weight(weight, index + 1, field)?;
                    let start = parser.round.pop().unwrap_or_default();
                    parser.multiply(start, weight);
                    next = end;
                }
                weight => {
                    next = weight.map_or(next, |(_, end)| end);
                    let literal = text.get(i..next).unwrap_or_default().iter().map(|character| character.c).collect();
                    parser.text(literal, index);
                }
            },
            ')' | ']' => parser.text(c.to_string(), index),
            _ => {
                next += text.iter().skip(next).take_while(|character| !"\\()[]:".contains(character.c)).count();
                parser.plain_text(text.get(i..next).unwrap_or_default());
            }
        }
        i = next;
    }
    for start in std::mem::take(&mut parser.round) {
        parser.multiply(start, BRACKET_FACTOR);
    }
    for start in std::mem::take(&mut parser.square) {
        parser.multiply(start, 1.0 / BRACKET_FACTOR);
    }
    merged(parser.fragments, field)
}

/// Replaces escaped characters by themselves.
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

/// Parses `:1.2)` at `colon`: the literal number, and the position after the bracket.
fn parse_weight(text: &[PromptChar], colon: usize) -> Option<(String, usize)> {
    let skip_blanks =
        |from: usize| from + text.iter().skip(from).take_while(|character| character.c.is_whitespace()).count();
    let start = skip_blanks(colon + 1);
    let signed = start + usize::from(text.get(start).is_some_and(|character| matches!(character.c, '+' | '-')));
    let end = signed
        + text.iter().skip(signed).take_while(|character| character.c.is_ascii_digit() || character.c == '.').count();
    let close = skip_blanks(end);
    let closed = end > signed && text.get(close).is_some_and(|character| character.c == ')');
    closed.then(|| (text.get(start..end).unwrap_or_default().iter().map(|character| character.c).collect(), close + 1))
}

fn merged(fragments: Vec<(Fragment, usize)>, field: &str) -> Result<Vec<Fragment>> {
    let mut merged: Vec<Fragment> = Vec::with_capacity(fragments.len());
    for (fragment, index) in fragments {
        if let Fragment::Text { text, weight } = &fragment {
            check_weight(*weight, index, field)?;
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
    use super::{Fragment, parse_attention, prompt_chars, subprompts};

    /// Weights to nine digits, as the factors are multiplied in one order or another.
    fn check(text: &str, expected: &[(&str, f64)]) {
        let got: Vec<(String, f64)> = parse_attention(&prompt_chars(text), "prompt")
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
    fn brackets_weigh_as_in_a1111() {
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
    fn unbalanced_brackets_parse_as_in_a1111() {
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
    fn break_within_brackets_ends_a_chunk() {
        check("a BREAK b", &[("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]);
        check("BREAKFAST in an OUTBREAK", &[("BREAKFAST in an OUTBREAK", 1.0)]);
        check("BREAK", &[("", 1.0), ("BREAK", -1.0), ("", 1.0)]);
        check("(a BREAK b:2)", &[("a", 2.0), ("BREAK", -1.0), ("b", 2.0)]);
    }

    fn check_error(text: &str, character: &str) {
        let prompt_chars = prompt_chars(text);
        let made = subprompts(&prompt_chars, "prompt").and_then(|subprompts| {
            subprompts.iter().map(|part| parse_attention(&part.text, "prompt")).collect::<Result<Vec<_>, _>>()
        });
        let error = made.unwrap_err();
        assert_eq!(error.code(), "invalid_parameter");
        assert!(error.to_string().ends_with(character), "{text}: {error}");
    }

    #[test]
    fn error_names_the_character() {
        check_error("a (word:1.2.3) b", "at character 9");
        check_error("é (😀:..)", "at character 6");
        check_error("(a:101)", "at character 4");
        check_error("(a:1e9) (b:9999999)", "at character 12");
        check_error(&format!("{}deep", "(".repeat(60)), "at character 61");
        check_error("a AND b :200", "at character 10");
        check_error(&format!("é {}deep", "([".repeat(40)), "at character 67");
        check_error(&"()[".repeat(70), "at character 193");
        assert!(parse_attention(&prompt_chars(&"([".repeat(32)), "prompt").is_ok());
    }

    fn check_parts(text: &str, expected: &[(&str, Option<f64>)]) {
        let made = subprompts(&prompt_chars(text), "prompt").unwrap();
        let got: Vec<(String, Option<f64>)> =
            made.iter().map(|part| (part.text.iter().map(|character| character.c).collect(), part.weight)).collect();
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
