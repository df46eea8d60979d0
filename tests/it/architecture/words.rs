//! Words that are no field's term, as parts of identifiers. Words of the wire are strings, and allowed.

use super::assert_none;
use super::sources::{identifiers, production, tests};

/// Words, and what to write for them.
const WORDS: [(&[&str], &str); 12] = [
    (&["wish", "wishes", "asked", "said"], "`request`, `options` or `requested`"),
    (&["told"], "`report`, `reported` or `echo`"),
    (&["crew", "hands"], "`resources` or `session`"),
    (&["afar", "away"], "`offloaded`"),
    (&["beside"], "`concat`, or the adapter's own name"),
    (&["laid", "turned"], "`packed` or `transposed`"),
    (&["room", "rooms"], "`memory` or `free`"),
    (
        &["settle", "settled", "settles", "climb", "climbed", "rung", "rungs", "ladder"],
        "`plan_memory`, `degrade` or `Fallback`",
    ),
    (&["walked", "land", "landed", "lands"], "`completed_steps`, `continues` or `on_step`"),
    (&["pace"], "`throughput`"),
    (&["net", "nets"], "`controlnet`"),
    (&["further"], "`pass` or `refiner`"),
];

/// The standard library has modules of these names, such as `std::net`.
const STANDARD_PATHS: [&str; 3] = ["std::", "std::os::unix::", "tokio::"];

/// Names of types, and what to write for them.
const TYPES: [(&str, &str); 6] = [
    ("Terrain", "`VariancePreserving` or `VarianceExploding`"),
    ("Floor", "`Dispatcher`"),
    ("Post", "`LaneId`"),
    ("Station", "`LaneState`"),
    ("Desk", "the query lane"),
    ("Bench", "`LaneThread`"),
];

#[test]
fn identifiers_are_terms_of_the_field() {
    let mut wrong = Vec::new();
    for source in production().iter().chain(tests()) {
        for (at, identifier) in identifiers(&source.code) {
            if STANDARD_PATHS.iter().any(|path| source.code[..at].ends_with(path)) {
                continue;
            }
            let Some((word, cure)) = private_word(identifier) else { continue };
            let (path, line) = (&source.path, source.line(at));
            let message = format!("{path}:{line} `{identifier}` has the private word `{word}`: write {cure}");
            wrong.push(message);
        }
    }
    assert_none(wrong);
}

/// The word of an identifier that is no term of the field, and what to write for it.
fn private_word(identifier: &str) -> Option<(String, &'static str)> {
    let is_type = identifier.starts_with(|c: char| c.is_ascii_uppercase());
    let parts = split(identifier);
    for part in &parts {
        if let Some((_, cure)) = WORDS.iter().find(|(words, _)| words.contains(&part.as_str())) {
            return Some((part.clone(), cure));
        }
        let named = |(name, _): &&(&str, &str)| is_type && name.to_lowercase() == *part;
        if let Some((_, cure)) = TYPES.iter().find(named) {
            return Some((part.clone(), cure));
        }
    }
    let continuing = parts.windows(2).find(|pair| ["go", "goes"].contains(&pair[0].as_str()) && pair[1] == "on")?;
    Some((continuing.join("_"), "`continues`"))
}

/// The words of an identifier in snake case or camel case, in lower case.
fn split(identifier: &str) -> Vec<String> {
    // One word, though camel case has a capital within.
    let identifier = identifier.replace("ControlNet", "Controlnet");
    let mut words: Vec<String> = Vec::new();
    let mut previous = '_';
    for c in identifier.chars() {
        if c != '_' {
            let starts = previous == '_' || (c.is_uppercase() && !previous.is_uppercase());
            if starts {
                words.push(String::new());
            }
            words.last_mut().unwrap().extend(c.to_lowercase());
        }
        previous = c;
    }
    words
}

#[test]
fn identifiers_are_split_into_words() {
    let cases: [(&str, &[&str]); 6] = [
        ("in_the_room", &["in", "the", "room"]),
        ("ControlNetFile", &["controlnet", "file"]),
        ("LaneThread", &["lane", "thread"]),
        ("VAE_SCALE", &["vae", "scale"]),
        ("_x2Y", &["x2", "y"]),
        ("landscape", &["landscape"]),
    ];
    for (identifier, expected) in cases {
        assert_eq!(split(identifier), expected, "{identifier}");
    }
}
