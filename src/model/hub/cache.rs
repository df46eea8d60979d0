//! The local cache in which Hugging Face's tools keep repositories. This file only reads it; [`super::fetch`] fills it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::catalog::files::ModelFile;
use crate::model::hub::reference::{Reference, is_commit, may_be_named};
use crate::model::interface::HubSettings;
use crate::roots::Roots;

/// Longest file that holds a commit.
const REF_LIMIT: u64 = 256;
/// Limits on listing a snapshot: files, and levels of folders.
const MOST_FILES: usize = 10_000;
const DEPTH: usize = 8;
/// How the weights of a network begin that is one part of something in a folder of its own.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// Most repositories that listing the cache considers.
const MOST_REPOSITORIES: usize = 10_000;

/// Where Hugging Face's tools keep what they have downloaded.
#[derive(Clone, Debug)]
pub struct HubCache {
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

impl HubCache {
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
            let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(MOST_REPOSITORIES);
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
    let text = String::from_utf8(ModelFile::Disk(path.clone()).read(REF_LIMIT)?).map_err(|_| corrupt())?;
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
