//! Names of repositories and files on the hub: `owner/name@revision/path/of/a/file`.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// The default branch.
const MAIN: &str = "main";
/// Longest owner, name or revision, in bytes; the hub allows 96 for a name.
const LONGEST: usize = 128;

/// A repository, or a file or folder in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `owner/name`
    pub repository: String,
    /// A branch, a tag or a commit; `None` is the branch `main`.
    pub revision: Option<String>,
    /// A path in the repository; empty for the whole.
    pub path: PathBuf,
}

impl Reference {
    /// Parses `owner/name@revision/path`; `None` if `name` has another form. `field` is the request field, for messages.
    ///
    /// # Errors
    /// `path_not_allowed` for `..`, `invalid_parameter` for a revision that no repository can have.
    pub fn parse(name: &str, field: &str) -> Result<Option<Self>> {
        let mut parts = Vec::new();
        for part in Path::new(name).components() {
            match part {
                Component::Normal(part) => parts.push(part.to_str().unwrap_or_default()),
                Component::ParentDir => return Err(Error::PathNotAllowed { path: PathBuf::from(name) }),
                _ => return Ok(None),
            }
        }
        let [owner, named, rest @ ..] = parts.as_slice() else { return Ok(None) };
        let (own, revision) = match named.split_once('@') {
            Some((own, revision)) => (own, Some(revision.replace("%2F", "/").replace("%2f", "/"))),
            None => (*named, None),
        };
        if !is_valid_name(owner) || !is_valid_name(own) {
            return Ok(None);
        }
        if let Some(revision) = &revision {
            check_revision(revision, field)?;
        }
        let revision = revision.filter(|revision| revision != MAIN);
        Ok(Some(Self { repository: format!("{owner}/{own}"), revision, path: rest.iter().collect() }))
    }

    /// The revision, `main` by default.
    #[must_use]
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// True if it names the repository and no file or folder in it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.path.as_os_str().is_empty()
    }

    /// True if the revision is a commit, which cannot move.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        is_commit(self.revision())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{}", revision.replace('/', "%2F"))?;
        }
        let path = self.path.display();
        if self.path.as_os_str().is_empty() { Ok(()) } else { write!(f, "/{path}") }
    }
}

/// `model` with the `revision` of the request appended.
///
/// # Errors
/// `invalid_parameter` for a revision of a model that is not a repository, or that already names one.
pub fn at_revision(model: Option<&str>, revision: Option<&str>) -> Result<Option<String>> {
    let Some(revision) = revision else { return Ok(model.map(str::to_owned)) };
    let wrong = |message: String| Err(Error::invalid("revision", message));
    let Some(model) = model else { return wrong("needs `model`, of which it is a revision".to_owned()) };
    check_revision(revision, "revision")?;
    match Reference::parse(model, "model")? {
        Some(Reference { revision: None, .. }) if model.contains('@') => wrong("is given in `model` too".to_owned()),
        Some(Reference { revision: Some(_), .. }) => wrong("is given in `model` too".to_owned()),
        Some(reference) => Ok(Some(Reference { revision: Some(revision.to_owned()), ..reference }.to_string())),
        None => wrong("belongs to a repository of the hub, and `model` names none as `owner/name`".to_owned()),
    }
}

pub(crate) fn is_valid_name(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let ends = |c: char| matches!(c, '.' | '-');
    (1..=LONGEST).contains(&part.len())
        && part.chars().all(known)
        && !part.starts_with(ends)
        && !part.ends_with(ends)
        && !part.contains("--")
        && !part.contains("..")
}

fn check_revision(revision: &str, field: &str) -> Result<()> {
    if revision.split('/').any(|part| part == "..") {
        return Err(Error::PathNotAllowed { path: PathBuf::from(revision) });
    }
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    let is_valid = |part: &str| !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(known);
    if revision.len() > LONGEST || !revision.split('/').all(is_valid) {
        return Err(Error::invalid(field, "must have a branch, a tag or a commit for its revision"));
    }
    Ok(())
}

pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
