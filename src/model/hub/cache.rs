//! The local cache in which Hugging Face's tools keep repositories. This file only reads it; `fetch` fills it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::catalog::files::ModelFile;
use crate::model::hub::reference::{Reference, is_commit, is_valid_name};
use crate::model::interface::HubSettings;
use crate::roots::Roots;

/// Longest file that holds a commit.
const REF_LIMIT: u64 = 256;
/// Limits on listing a snapshot: files, and levels of folders.
const MOST_FILES: usize = 10_000;
const DEPTH: usize = 8;
/// Stems of weight files that, in a subfolder, belong to one network of a larger model.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// Most repositories that listing the cache considers.
const MOST_REPOSITORIES: usize = 10_000;

/// Where Hugging Face's tools keep what they have downloaded.
#[derive(Clone, Debug)]
pub struct HubCache {
    /// `None` if there is no home folder either.
    folder: Option<PathBuf>,
    /// True if missing files may be downloaded.
    pub download: bool,
}

/// One commit of one repository, possibly incomplete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The repository's folder in the cache, which holds all its files.
    folder: PathBuf,
    pub commit: String,
}

impl Snapshot {
    /// The folder with the files by their paths in the repository, as links to their blobs.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join("snapshots").join(&self.commit)
    }

    /// Resolves `path` in the repository. The empty path is the only weight file, if the repository is not a diffusers
    /// folder and the cache has exactly one.
    #[must_use]
    pub fn resolve(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() && !self.path().join("model_index.json").exists() {
            let files = self.files();
            let mut weights = files.iter().filter(|name| name.ends_with(".safetensors") || name.ends_with(".gguf"));
            let is_component = |name: &str| {
                name.rsplit_once('/').is_some_and(|(_, own)| STEMS.iter().any(|stem| own.starts_with(stem)))
            };
            if let (Some(only), None) = (weights.next(), weights.next())
                && !is_component(only)
            {
                return PathBuf::from(only);
            }
        }
        path.to_owned()
    }

    /// The cached files, by their paths in the repository.
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

    /// Restricts access to the files of this repository.
    #[must_use]
    pub fn roots(&self) -> Roots {
        Roots::new([self.folder.clone()])
    }
}

impl HubCache {
    /// The folder comes from the settings, `$HF_HUB_CACHE`, `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub` or
    /// `~/.cache/huggingface/hub`, in this order. `HF_HUB_OFFLINE` switches downloads off.
    #[must_use]
    pub fn new(settings: &HubSettings) -> Self {
        let folder =
            settings.cache.clone().or_else(|| env_folder("HF_HUB_CACHE")).or_else(|| Some(home()?.join("hub")));
        let offline = env::var("HF_HUB_OFFLINE")
            .is_ok_and(|value| matches!(value.trim().to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        Self { folder, download: settings.download && !offline }
    }

    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The snapshot of a repository, if it is cached.
    ///
    /// # Errors
    /// `model_corrupt` for a revision whose ref holds no commit, `path_not_allowed` for one that leads out of
    /// the repository's folder.
    pub fn find(&self, reference: &Reference) -> Result<Option<Snapshot>> {
        let Some(folder) = self.folder.as_ref().map(|cache| cache.join(folder_name(&reference.repository))) else {
            return Ok(None);
        };
        let commit = match is_commit(reference.revision()) {
            true => reference.revision().to_lowercase(),
            false => match commit_of(&folder, reference.revision())? {
                Some(commit) => commit,
                None => return Ok(None),
            },
        };
        let snapshot = Snapshot { folder, commit };
        Ok(snapshot.path().is_dir().then_some(snapshot))
    }

    /// Every cached model repository, sorted: at `main`, or if that is not cached, at each cached commit.
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
            if !is_valid_name(owner) || !is_valid_name(name) {
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

    /// The error for a repository that is not cached.
    #[must_use]
    pub fn missing(&self, reference: &Reference) -> Error {
        let name = reference.to_string();
        match self.download {
            true => Error::Unfetched { name, otherwise: None },
            false => {
                Error::Offline { what: format!("`{name}`, which is neither under a model root nor in the cache,") }
            }
        }
    }
}

/// The name of a repository's folder in the cache.
#[must_use]
pub fn folder_name(repository: &str) -> String {
    format!("models--{}", repository.replace('/', "--"))
}

/// The commit of a branch or tag when it was downloaded.
fn commit_of(folder: &Path, revision: &str) -> Result<Option<String>> {
    let path = folder.join("refs").join(revision);
    let roots = Roots::new([folder.to_owned()]);
    if !roots.resolve(&path, "model")?.exists() {
        return Ok(None);
    }
    let corrupt = || Error::ModelCorrupt { path: path.clone(), message: "must hold a commit".to_owned() };
    let text = String::from_utf8(ModelFile::Disk(path.clone()).read(REF_LIMIT)?).map_err(|_| corrupt())?;
    let commit = text.trim();
    if is_commit(commit) { Ok(Some(commit.to_lowercase())) } else { Err(corrupt()) }
}

/// A folder from an environment variable.
fn env_folder(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folder of Hugging Face's tools.
pub(crate) fn home() -> Option<PathBuf> {
    let cache = || env_folder("XDG_CACHE_HOME").or_else(|| Some(env_folder("HOME")?.join(".cache")));
    env_folder("HF_HOME").or_else(|| Some(cache()?.join("huggingface")))
}
