//! The path from a request line to one of its values.

/// One step into JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathStep {
    Key(String),
    Index(usize),
}

/// `path` as a JSON pointer (RFC 6901) below `start`.
pub(crate) fn pointer(start: &str, path: &[PathStep]) -> String {
    let mut pointer = start.to_owned();
    for step in path {
        pointer.push('/');
        match step {
            PathStep::Key(key) => pointer.push_str(&key.replace('~', "~0").replace('/', "~1")),
            PathStep::Index(index) => pointer.push_str(&index.to_string()),
        }
    }
    pointer
}

/// `path` for people: `requests.0.steps`.
pub(crate) fn dotted(path: &[PathStep]) -> String {
    let names = path.iter().map(|step| match step {
        PathStep::Key(key) => key.clone(),
        PathStep::Index(index) => index.to_string(),
    });
    names.collect::<Vec<_>>().join(".")
}
