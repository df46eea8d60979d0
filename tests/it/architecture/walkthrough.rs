//! The stops of `docs/walkthrough.md` name functions that exist.

use std::collections::BTreeSet;
use std::fs;

use super::assert_none;
use super::sources::{identifiers, production, root};

const PAGE: &str = "docs/walkthrough.md";
const MOST_STOPS: usize = 40;

/// An item of the page's numbered lists.
#[derive(Debug, PartialEq)]
struct Stop<'a> {
    number: usize,
    path: &'a str,
    function: &'a str,
}

#[test]
fn stops_of_the_walkthrough_exist() {
    let page = fs::read_to_string(root().join(PAGE)).unwrap();
    let items: Vec<_> = page.lines().filter(|line| is_item(line)).collect();
    assert!((1..=MOST_STOPS).contains(&items.len()), "{PAGE} has {} stops, not 1 to {MOST_STOPS}", items.len());
    let (mut wrong, mut seen) = (Vec::new(), BTreeSet::new());
    for (index, item) in items.iter().enumerate() {
        let Some(Stop { number, path, function }) = stop(item) else {
            let message = format!("{PAGE}: begin the item with `file:function`: {item}");
            wrong.push(message);
            continue;
        };
        if number != index + 1 {
            wrong.push(format!("{PAGE}: stop {number} is the {}th", index + 1));
        }
        if !seen.insert((path, function)) {
            wrong.push(format!("{PAGE}: `{path}:{function}` is a stop twice"));
        }
        match production().iter().find(|source| source.path == path) {
            None => wrong.push(format!("{PAGE}: `{path}` does not exist: name the file that has `{function}` now")),
            Some(source) if !defines(&source.production, function) => {
                wrong
                    .push(format!("{PAGE}: `{path}` has no `fn {function}`: name the function that does its work now"));
            }
            Some(_) => {}
        }
    }
    assert_none(wrong);
}

fn is_item(line: &str) -> bool {
    line.split_once(". ").is_some_and(|(number, _)| number.parse::<usize>().is_ok())
}

/// The stop that an item begins with.
fn stop(item: &str) -> Option<Stop<'_>> {
    let (number, rest) = item.split_once(". ")?;
    let (word, _) = rest.strip_prefix('`')?.split_once('`')?;
    let (path, function) = word.split_once(':')?;
    Some(Stop { number: number.parse().ok()?, path, function })
}

/// True if code has a function of this name.
fn defines(code: &str, function: &str) -> bool {
    let words = || identifiers(code).map(|(_, word)| word);
    words().zip(words().skip(1)).any(|(keyword, name)| keyword == "fn" && name == function)
}

#[test]
fn an_item_is_a_number_and_a_function() {
    let stop_of = |number, path, function| Some(Stop { number, path, function });
    let cases = [
        ("7. `src/a.rs:read` reads `b`.", true, stop_of(7, "src/a.rs", "read")),
        ("8. Reads `src/a.rs:read`.", true, None),
        ("9. `src/a.rs` reads.", true, None),
        ("   goes on. `src/a.rs:read`", false, None),
    ];
    for (line, item, expected) in cases {
        assert_eq!((is_item(line), stop(line)), (item, expected), "{line}");
    }
    assert!(defines("impl A { pub(crate) fn read<T>(&self) {} }", "read"));
    assert!(!defines("fn read_all() { read() }", "read"));
}
