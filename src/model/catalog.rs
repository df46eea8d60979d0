//! Which models can be named, and what a name stands for. Holds no weights, so that it works beside the compute thread.

use std::collections::HashSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::checkpoint::Checkpoint;
use super::companion::Companion;
use super::demo;
use super::folder::admit;
use super::hub::{Cache, Reference, Snapshot, at_revision};
use super::interface::Settings;
use crate::error::{Error, Result, nearest};
use crate::roots::Roots;

/// Folders that one look for models may visit, and how far below a root it goes.
const FOLDERS: usize = 10_000;
const DEPTH: usize = 5;
/// Checkpoints whose small files stay understood.
const KEPT: usize = 16;

/// Finds checkpoints beneath the configured roots.
pub struct Catalog {
    folders: Vec<PathBuf>,
    roots: Roots,
    default: Option<String>,
    mmap: bool,
    /// Repositories by `owner/name`.
    pub hub: Cache,
    /// Those that were asked for, least recently first.
    known: Vec<Arc<Checkpoint>>,
}

/// A model that can be named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    /// `None` for the embedded model.
    path: Option<PathBuf>,
    /// Where it lies in the cache of the hub, for one that does.
    cached: Option<Snapshot>,
}

impl Listed {
    /// Whether a repository of the cache says that it is SDXL.
    fn is_cached_sdxl(&self) -> bool {
        let path = self.path.as_ref().filter(|_| self.cached.is_some());
        path.is_some_and(|path| Checkpoint::claims_sdxl(path))
    }
}

impl Catalog {
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self {
            folders: settings.roots.clone(),
            roots: Roots::new(settings.roots.clone()),
            default: settings.default.clone(),
            mmap: settings.mmap,
            hub: Cache::new(&settings.hub),
            known: Vec::new(),
        }
    }

    /// The name of the model of requests that name none.
    #[must_use]
    pub fn default_name(&self) -> &str {
        self.default.as_deref().unwrap_or(demo::NAME)
    }

    /// The checkpoint that `name` stands for: `demo`, a path beneath a root, an absolute path that lies beneath one, or
    /// `owner/name` of a repository in the cache of the hub. `None` is the default model. A checkpoint whose files have changed since is understood anew.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, `model_not_found` with the nearest name, `unsafe_format`,
    /// `model_unsupported` and `model_corrupt` for what is found but cannot be used.
    pub fn resolve(&mut self, name: Option<&str>) -> Result<Arc<Checkpoint>> {
        let name = name.unwrap_or(self.default_name()).to_owned();
        let listed = self.locate(&name)?;
        self.checkpoint(&listed)
    }

    /// As [`Self::resolve`], at the revision of a repository that stands beside its name.
    ///
    /// # Errors
    /// As [`Self::resolve`], and `invalid_parameter` for a revision of what has none.
    pub fn resolve_at(&mut self, name: Option<&str>, revision: Option<&str>) -> Result<Arc<Checkpoint>> {
        let name = at_revision(name, revision)?;
        self.resolve(name.as_deref())
    }

    /// Every model that can be named, `demo` first, the others by name.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        for root in self.real_roots() {
            let mut waiting = vec![(root, 0)];
            while let Some((folder, depth)) = waiting.pop() {
                let Ok(Some(real)) = admit(&self.roots, &folder) else { continue };
                if seen.len() >= FOLDERS || !seen.insert(real.clone()) {
                    continue;
                }
                if folder.join("model_index.json").is_file() {
                    found.push(Listed { name: self.name_of(&real), path: Some(real), cached: None });
                } else if depth < DEPTH {
                    let folders = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
                    waiting.extend(folders.filter(|path| path.is_dir()).map(|path| (path, depth + 1)));
                }
            }
        }
        found.extend(self.list_cached());
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found.insert(0, Listed { name: demo::NAME.to_owned(), path: None, cached: None });
        found
    }

    /// The checkpoint of a listed model.
    ///
    /// # Errors
    /// Those of [`Self::resolve`].
    pub fn checkpoint(&mut self, listed: &Listed) -> Result<Arc<Checkpoint>> {
        // The embedded files do not change, so they are understood once.
        let known = self.known.iter().find(|known| known.name == demo::NAME).filter(|_| listed.path.is_none());
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        let fresh = match &listed.path {
            None => Checkpoint::demo()?,
            Some(path) => {
                let own = listed.cached.as_ref().map(Snapshot::roots);
                let mut found = Checkpoint::open_folder(&listed.name, path, own.as_ref().unwrap_or(&self.roots))?;
                found.mmap = self.mmap;
                found.revision = listed.cached.as_ref().map(|snapshot| snapshot.commit.clone());
                found
            }
        };
        let place = self.known.iter().position(|known| known.key == fresh.key && known.name == fresh.name);
        let checkpoint = place.map_or_else(|| Arc::new(fresh), |place| self.known.remove(place));
        self.known.push(Arc::clone(&checkpoint));
        let excess = self.known.len().saturating_sub(KEPT);
        self.known.drain(..excess);
        Ok(checkpoint)
    }

    /// What `name` stands for beside a checkpoint: a safetensors file, with its ending or without, or a folder, beneath
    /// a root. `field` is the part of the request in which the name stood.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, `model_not_found`, `unsafe_format`, `model_unsupported` and
    /// `model_corrupt` for what is found but cannot be used.
    pub fn companion(&self, name: &str, field: &str) -> Result<Companion> {
        let path = sound(name, field)?;
        let mut refused = None;
        let ended = path.with_added_extension("safetensors");
        for candidate in self.candidates(path).into_iter().chain(self.candidates(&ended)) {
            match admit(&self.roots, &candidate) {
                // By the name that was given: what a link leads to need not end as a file of weights does.
                Ok(Some(_)) => return Companion::find(name, &candidate, &self.roots, self.mmap),
                Ok(None) => {}
                Err(error) => refused = Some(error),
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        match Reference::parse(name, field)?.filter(|reference| self.may_be_cached(reference)) {
            Some(reference) => self.cached_companion(name, &reference),
            None => {
                let hint = "give the path of a safetensors file or a folder beneath the configured model roots";
                Err(Error::ModelNotFound { name: name.to_owned(), hint: Some(hint.to_owned()) })
            }
        }
    }

    fn locate(&self, name: &str) -> Result<Listed> {
        if name == demo::NAME {
            return Ok(Listed { name: name.to_owned(), path: None, cached: None });
        }
        let path = sound(name, "model")?;
        let mut refused = None;
        for candidate in self.candidates(path) {
            match admit(&self.roots, &candidate) {
                Ok(Some(real)) if real.is_dir() => {
                    return Ok(Listed { name: self.name_of(&real), path: Some(real), cached: None });
                }
                Ok(Some(_)) => return Err(not_a_folder(name, &candidate)),
                Ok(None) => {}
                Err(error) => refused = Some(error),
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        match Reference::parse(name, "model")?.filter(|reference| self.may_be_cached(reference)) {
            Some(reference) => self.locate_cached(&reference),
            None => Err(self.not_found(name)),
        }
    }

    /// Whether a name that is no path beneath a root may be a repository's: a folder beneath a root means itself.
    fn may_be_cached(&self, reference: &Reference) -> bool {
        let owner = reference.repository.split('/').next().unwrap_or_default();
        matches!(self.hub.find(reference), Ok(Some(_)) | Err(_))
            || !self.real_roots().iter().any(|root| root.join(owner).is_dir())
    }

    fn locate_cached(&self, reference: &Reference) -> Result<Listed> {
        let name = reference.to_string();
        let Some(snapshot) = self.hub.find(reference)? else { return Err(self.hub.missing(reference)) };
        let path = snapshot.path().join(&reference.path);
        match admit(&snapshot.roots(), &path)? {
            Some(real) if real.is_dir() => Ok(Listed { name, path: Some(path), cached: Some(snapshot) }),
            Some(_) => Err(not_a_folder(&name, &path)),
            None => Err(self.hub.missing(reference)),
        }
    }

    fn cached_companion(&self, name: &str, reference: &Reference) -> Result<Companion> {
        let Some(snapshot) = self.hub.find(reference)? else { return Err(self.hub.missing(reference)) };
        let path = snapshot.path().join(&reference.path);
        let ended = path.with_added_extension("safetensors");
        for candidate in [path, ended] {
            if admit(&snapshot.roots(), &candidate)?.is_some() {
                return Companion::find(name, &candidate, &snapshot.roots(), self.mmap);
            }
        }
        Err(self.hub.missing(reference))
    }

    /// Models in the cache of the hub that no folder beneath a root hides.
    fn list_cached(&self) -> Vec<Listed> {
        let references = self.hub.references().into_iter();
        let located = references.filter_map(|reference| self.locate(&reference.to_string()).ok());
        located.filter(|listed| listed.is_cached_sdxl()).collect()
    }

    /// The roots that exist, with every link resolved.
    fn real_roots(&self) -> Vec<PathBuf> {
        self.folders.iter().filter_map(|root| fs::canonicalize(root).ok()).collect()
    }

    /// Where a name may lead: beneath each root, to the root of that name, or from the working directory into a root.
    fn candidates(&self, path: &Path) -> Vec<PathBuf> {
        if path.is_absolute() {
            return vec![path.to_owned()];
        }
        let roots = self.real_roots();
        let mut candidates: Vec<PathBuf> = roots.iter().map(|root| root.join(path)).collect();
        candidates.extend(roots.iter().filter(|root| root.file_name() == Some(path.as_os_str())).cloned());
        let here = std::path::absolute(path).ok();
        candidates.extend(here.filter(|here| self.roots.beneath(here, "model").is_ok()));
        candidates
    }

    /// The path beneath the first root, if that name leads here; otherwise the whole path.
    fn name_of(&self, folder: &Path) -> String {
        let real = |path: &Path| fs::canonicalize(path).ok();
        for root in self.real_roots() {
            let Ok(below) = folder.strip_prefix(&root) else { continue };
            let name = if below.as_os_str().is_empty() { root.file_name().map(Path::new) } else { Some(below) };
            let Some(name) = name else { continue };
            let leads_to = self.candidates(name).into_iter().find(|path| path.exists());
            if leads_to.and_then(|path| real(&path)) == real(folder) && name != Path::new(demo::NAME) {
                return name.to_string_lossy().into_owned();
            }
        }
        folder.to_string_lossy().into_owned()
    }

    fn not_found(&self, name: &str) -> Error {
        let listed = self.list();
        let close = nearest(name, listed.iter().map(|listed| listed.name.as_str()));
        let hint = match close {
            Some(close) => format!("did you mean `{close}`?"),
            None => "`model.list` names every model beneath the configured roots".to_owned(),
        };
        Error::ModelNotFound { name: name.to_owned(), hint: Some(hint) }
    }
}

/// A name that may be a path.
fn sound<'a>(name: &'a str, field: &str) -> Result<&'a Path> {
    if name.trim().is_empty() || name.contains('\0') {
        return Err(Error::invalid(field, "must be the name of a model or a path, got neither"));
    }
    let path = Path::new(name);
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(Error::PathNotAllowed { path: path.to_owned() });
    }
    Ok(path)
}

fn not_a_folder(name: &str, path: &Path) -> Error {
    let end = path.extension().map(|end| end.to_string_lossy().to_lowercase()).unwrap_or_default();
    match end.as_str() {
        "ckpt" | "pt" | "pth" | "bin" => Error::UnsafeFormat { path: path.to_owned() },
        "safetensors" => Error::ModelUnsupported {
            name: name.to_owned(),
            message: "it is a single file, and this worker reads models in the diffusers folder layout".to_owned(),
        },
        _ => Error::ModelUnsupported {
            name: name.to_owned(),
            message: "it is a file, and a model is a folder in the diffusers layout".to_owned(),
        },
    }
}
