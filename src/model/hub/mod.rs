//! Repositories of the hub by `owner/name`, and the local cache in which Hugging Face's tools keep them. Reads the cache
//! only: what is missing from it is the business of `workers/fetch/`.

pub(crate) mod download;
pub(crate) mod fetch;
pub(crate) mod sha256;

use std::env;
use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::catalog::files::Found;
use crate::model::interface::HubSettings;
use crate::roots::Roots;

/// The branch of those who name none.
const MAIN: &str = "main";
/// Longest owner, name or revision, in bytes; the hub allows 96 for a name.
const LONGEST: usize = 128;
/// Longest file that holds a commit.
const REF_LIMIT: u64 = 256;
/// Files of a snapshot that are looked at, and how far below its root they lie.
const MOST_FILES: usize = 10_000;
const DEPTH: usize = 8;
/// How the weights of a network begin, which is a part of something in a folder of its own.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// Repositories that one look into the cache considers.
const MOST: usize = 10_000;

/// A repository, and what is meant of it: `owner/name@revision/path/of/a/file`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `owner/name`
    pub repository: String,
    /// A branch, a tag or a commit; `None` is the branch `main`.
    pub revision: Option<String>,
    /// The part of the repository that is meant; empty for the whole.
    pub path: PathBuf,
}

impl Reference {
    /// What `name` means on the hub; `None` if it has not the form. `field` is where it stood in the request.
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
        if !may_be_named(owner) || !may_be_named(own) {
            return Ok(None);
        }
        if let Some(revision) = &revision {
            check_revision(revision, field)?;
        }
        let revision = revision.filter(|revision| revision != MAIN);
        Ok(Some(Self { repository: format!("{owner}/{own}"), revision, path: rest.iter().collect() }))
    }

    /// The revision that is meant.
    #[must_use]
    pub fn wanted(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// Whether the repository is meant, and no file or folder of it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.path.as_os_str().is_empty()
    }

    /// Whether the revision is a commit, which never comes to mean something else.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        is_commit(self.wanted())
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

/// `model` at the revision that a request names beside it.
///
/// # Errors
/// `invalid_parameter` for a revision of what is no repository, or that `model` names already.
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

fn may_be_named(part: &str) -> bool {
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
    let sound = |part: &str| !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(known);
    if revision.len() > LONGEST || !revision.split('/').all(sound) {
        return Err(Error::invalid(field, "must have a branch, a tag or a commit for its revision"));
    }
    Ok(())
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Where Hugging Face's tools keep what they have downloaded.
#[derive(Clone, Debug)]
pub struct Cache {
    /// None where there is no home folder either.
    folder: Option<PathBuf>,
    /// Whether what is missing may be downloaded.
    pub download: bool,
}

/// One commit of one repository, as far as it is in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The repository's own folder of the cache, beneath which all its files lie.
    folder: PathBuf,
    pub commit: String,
}

impl Snapshot {
    /// The files by their paths in the repository: links to where they are stored.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join("snapshots").join(&self.commit)
    }

    /// The path in the repository that is meant by `path`: a repository that is no model in diffusers' layout, and of
    /// which one file of weights is here, stands for that file.
    #[must_use]
    pub fn meant(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() && !self.path().join("model_index.json").exists() {
            let files = self.files();
            let mut weights = files.iter().filter(|name| name.ends_with(".safetensors") || name.ends_with(".gguf"));
            let part = |name: &str| {
                name.rsplit_once('/').is_some_and(|(_, own)| STEMS.iter().any(|stem| own.starts_with(stem)))
            };
            if let (Some(only), None) = (weights.next(), weights.next())
                && !part(only)
            {
                return PathBuf::from(only);
            }
        }
        path.to_owned()
    }

    /// The files that are here, by their paths in the repository.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut waiting = vec![(String::new(), 0)];
        while let Some((folder, depth)) = waiting.pop() {
            for entry in fs::read_dir(self.path().join(&folder)).into_iter().flatten().flatten() {
                let Ok(own) = entry.file_name().into_string() else { continue };
                let name = if folder.is_empty() { own } else { format!("{folder}/{own}") };
                match fs::metadata(entry.path()) {
                    Ok(meta) if meta.is_dir() && depth < DEPTH => waiting.push((name, depth + 1)),
                    Ok(meta) if meta.is_file() && names.len() < MOST_FILES => names.push(name),
                    _ => {}
                }
            }
        }
        names.sort();
        names
    }

    /// The files of this repository, and nothing else of the cache.
    #[must_use]
    pub fn roots(&self) -> Roots {
        Roots::new([self.folder.clone()])
    }
}

impl Cache {
    /// The folder is that of the settings, `$HF_HUB_CACHE`, `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub` or
    /// `~/.cache/huggingface/hub`, whichever is named first. `HF_HUB_OFFLINE` overrules that downloads are on.
    #[must_use]
    pub fn new(settings: &HubSettings) -> Self {
        let folder = settings.cache.clone().or_else(|| named("HF_HUB_CACHE")).or_else(|| Some(home()?.join("hub")));
        let offline = env::var("HF_HUB_OFFLINE")
            .is_ok_and(|value| matches!(value.trim().to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        Self { folder, download: settings.download && !offline }
    }

    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The snapshot that is meant, if it is here.
    ///
    /// # Errors
    /// `model_corrupt` for a revision that leads to no commit, `path_not_allowed` for one that leads out of the
    /// repository's folder.
    pub fn find(&self, reference: &Reference) -> Result<Option<Snapshot>> {
        let Some(folder) = self.folder.as_ref().map(|cache| cache.join(folder_name(&reference.repository))) else {
            return Ok(None);
        };
        let commit = match is_commit(reference.wanted()) {
            true => reference.wanted().to_lowercase(),
            false => match commit_of(&folder, reference.wanted())? {
                Some(commit) => commit,
                None => return Ok(None),
            },
        };
        let snapshot = Snapshot { folder, commit };
        Ok(snapshot.path().is_dir().then_some(snapshot))
    }

    /// Every repository of a model of which something is here, by name: at `main`, or at the commits that are here
    /// where `main` is not.
    #[must_use]
    pub fn references(&self) -> Vec<Reference> {
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(MOST);
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        let mut found = Vec::new();
        for folder in self.folder.as_deref().map(names).unwrap_or_default() {
            let Some((owner, name)) = folder.strip_prefix("models--").and_then(|name| name.split_once("--")) else {
                continue;
            };
            if !may_be_named(owner) || !may_be_named(name) {
                continue;
            }
            let reference = Reference { repository: format!("{owner}/{name}"), revision: None, path: PathBuf::new() };
            if matches!(self.find(&reference), Ok(Some(_))) {
                found.push(reference);
                continue;
            }
            let snapshots = self.folder.iter().flat_map(|cache| names(&cache.join(&folder).join("snapshots")));
            let commits = snapshots.filter(|commit| is_commit(commit));
            found.extend(commits.map(|commit| Reference { revision: Some(commit), ..reference.clone() }));
        }
        found.sort_by_key(Reference::to_string);
        found
    }

    /// What to say of a repository that is not here.
    #[must_use]
    pub fn missing(&self, reference: &Reference) -> Error {
        let name = reference.to_string();
        match self.download {
            true => Error::Unfetched { name, otherwise: None },
            false => Error::Offline { what: format!("`{name}`, which is neither beneath a root nor in the cache,") },
        }
    }
}

/// The folder of a repository in the cache.
#[must_use]
pub fn folder_name(repository: &str) -> String {
    format!("models--{}", repository.replace('/', "--"))
}

/// The commit that a branch or a tag of a repository stood at when it was downloaded.
fn commit_of(folder: &Path, revision: &str) -> Result<Option<String>> {
    let path = folder.join("refs").join(revision);
    let roots = Roots::new([folder.to_owned()]);
    if !roots.beneath(&path, "model")?.exists() {
        return Ok(None);
    }
    let corrupt = || Error::ModelCorrupt { path: path.clone(), message: "must hold a commit".to_owned() };
    let text = String::from_utf8(Found::Disk(path.clone()).read(REF_LIMIT)?).map_err(|_| corrupt())?;
    let commit = text.trim();
    if is_commit(commit) { Ok(Some(commit.to_lowercase())) } else { Err(corrupt()) }
}

/// A folder that the environment names.
fn named(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folder of Hugging Face's tools.
pub(crate) fn home() -> Option<PathBuf> {
    let cache = || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    named("HF_HOME").or_else(|| Some(cache()?.join("huggingface")))
}
