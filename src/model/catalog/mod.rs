//! Which models can be named, and what a name stands for. Holds no weights, so that it works beside the compute thread.

pub mod component_file;
pub mod demo;
pub(crate) mod files;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, nearest};
use crate::model::catalog::component_file::{ComponentFile, readable};
use crate::model::catalog::files::{ModelFile, ModelFolder, admit};
use crate::model::checkpoint::builder::CheckpointBuilder;
use crate::model::checkpoint::files::WeightFiles;
use crate::model::checkpoint::identify::is_sdxl;
use crate::model::checkpoint::key::key;
use crate::model::checkpoint::{Checkpoint, CheckpointKey, Part};
use crate::model::hub::cache::{HubCache, Snapshot};
use crate::model::hub::reference::Reference;
use crate::model::interface::Settings;
use crate::model::weights::open::look;
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
    pub hub: HubCache,
    /// Those that were asked for, least recently first.
    known: Vec<Arc<Checkpoint>>,
    /// Whether each safetensors file that was come across is a model, by its state.
    looked: HashMap<CheckpointKey, bool>,
}

/// Parts that come from files of their own, each with the name that the request gives.
pub type Separate<'a> = [(Part, Option<&'a str>)];

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
    /// Whether a repository of the cache lacks files that a model has. One of which a single file is here may be any.
    fn is_incomplete(&self) -> bool {
        let repository = matches!(Reference::parse(&self.name, "model"), Ok(Some(known)) if known.is_whole());
        self.cached.as_ref().is_some_and(|snapshot| repository && Checkpoint::lacks_files(&snapshot.path()))
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
            hub: HubCache::new(&settings.hub),
            known: Vec::new(),
            looked: HashMap::new(),
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
        self.resolve_with(name, &[])
    }

    /// The same with parts of other files.
    ///
    /// # Errors
    /// Those of [`Self::resolve`], for the model and for each part, and `model_unsupported` where they do not fit together.
    pub fn resolve_with(&mut self, name: Option<&str>, separate: &Separate<'_>) -> Result<Arc<Checkpoint>> {
        let name = name.unwrap_or(self.default_name()).to_owned();
        let listed = self.locate(&name)?;
        let given = separate.iter().filter_map(|(part, name)| Some((*part, (*name)?)));
        let mut others = given.map(|(part, name)| Ok((part, self.part(part, name)?))).collect::<Result<Vec<_>>>()?;
        // The scale of the latents is the UNet's, unless the autoencoder that is named says another.
        others.sort_by_key(|(part, _)| *part);
        self.assembled(&listed, &others).map_err(|error| match listed.is_incomplete() {
            true if self.hub.download => Error::Unfetched { name: listed.name, otherwise: Some(Box::new(error)) },
            _ => error,
        })
    }

    /// Every state of a model that was asked for: with parts of other files, and before its own files changed.
    #[must_use]
    pub fn states(&self, name: &str) -> Vec<CheckpointKey> {
        self.known.iter().filter(|known| known.name == name).map(|known| known.key).collect()
    }

    /// Every model that can be named, `demo` first, the others by name.
    #[must_use]
    pub fn list(&mut self) -> Vec<Listed> {
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
                    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                        let path = entry.path();
                        if path.is_dir() {
                            waiting.push((path, depth + 1));
                        } else if seen.len() < FOLDERS && self.is_model(&path, &self.roots.clone()) {
                            // A link may lead to a file that was found already.
                            let Ok(Some(real)) = admit(&self.roots, &path) else { continue };
                            if seen.insert(real) {
                                found.push(Listed { name: self.name_of(&path), path: Some(path), cached: None });
                            }
                        }
                    }
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
        self.assembled(listed, &[])
    }

    fn assembled(&mut self, listed: &Listed, others: &[(Part, ComponentFile)]) -> Result<Arc<Checkpoint>> {
        // The embedded files do not change, so they are understood once.
        let plain = listed.path.is_none() && others.is_empty();
        let known = self.known.iter().find(|known| plain && known.is_demo());
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        let roots = &listed.cached.as_ref().map_or_else(|| self.roots.clone(), Snapshot::roots);
        let mut draft = match &listed.path {
            None => CheckpointBuilder::from_folder(demo::NAME, &ModelFolder::Embedded)?,
            Some(path) if path.is_dir() => CheckpointBuilder::from_folder(&listed.name, &self.folder(path, roots))?,
            Some(path) => {
                let (key, files) = self.single(path, roots)?;
                // A header of thousands of tensors is parsed once.
                if others.is_empty()
                    && let Some(place) =
                        self.known.iter().position(|known| known.key == key && known.name == listed.name)
                {
                    let known = self.known.remove(place);
                    self.known.push(Arc::clone(&known));
                    return Ok(known);
                }
                CheckpointBuilder::single(&listed.name, key, files)?
            }
        };
        others.iter().try_for_each(|(part, other)| draft.replace(*part, other))?;
        let mut fresh = draft.finish()?;
        fresh.mmap = self.mmap;
        fresh.revision = listed.cached.as_ref().map(|snapshot| snapshot.commit.clone());
        let place = self.known.iter().position(|known| known.key == fresh.key && known.name == fresh.name);
        let checkpoint = place.map_or_else(|| Arc::new(fresh), |place| self.known.remove(place));
        self.known.push(Arc::clone(&checkpoint));
        let excess = self.known.len().saturating_sub(KEPT);
        self.known.drain(..excess);
        Ok(checkpoint)
    }

    fn folder(&self, path: &Path, roots: &Roots) -> ModelFolder {
        ModelFolder::Disk { path: path.to_owned(), roots: roots.clone() }
    }

    /// A single file, and what tells its state from others.
    fn single(&self, path: &Path, roots: &Roots) -> Result<(CheckpointKey, WeightFiles)> {
        let folder = self.folder(path.parent().unwrap_or(path), roots);
        let found = folder.need(&path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default())?;
        Ok((key(&folder, std::slice::from_ref(&found)), WeightFiles::new(vec![found])))
    }

    /// Whether a file is a model, by its header.
    fn is_model(&mut self, path: &Path, roots: &Roots) -> bool {
        if path.extension().is_none_or(|end| end != "safetensors") {
            return false;
        }
        let Ok((key, files)) = self.single(path, roots) else { return false };
        if let Some(known) = self.looked.get(&key) {
            return *known;
        }
        let found: Option<&ModelFile> = files.files.first();
        let is = found.is_some_and(|found| look(found).is_ok_and(|weights| is_sdxl(&weights)));
        if self.looked.len() > FOLDERS {
            self.looked.clear();
        }
        self.looked.insert(key, is);
        is
    }

    /// The file or folder that a request names for a part. Of a whole model in diffusers' layout it is that part's folder.
    fn part(&self, part: Part, name: &str) -> Result<ComponentFile> {
        let path = sound(name, part.name())?;
        let own = path.join(part.name());
        let whole = |candidate: PathBuf| candidate.join("model_index.json").is_file();
        let whole = self.candidates(path).into_iter().any(whole) || self.is_cached_whole(path, part)?;
        let name = if whole { &own } else { path };
        self.component_file(&name.to_string_lossy(), part.name())
    }

    /// Whether a name that leads to nothing beneath a root is that of a whole model in the cache of the hub.
    fn is_cached_whole(&self, path: &Path, part: Part) -> Result<bool> {
        let ended = path.with_added_extension("safetensors");
        if self.candidates(path).into_iter().chain(self.candidates(&ended)).any(|candidate| candidate.exists()) {
            return Ok(false);
        }
        let Some(reference) = Reference::parse(&path.to_string_lossy(), part.name())? else { return Ok(false) };
        let Ok(Some(snapshot)) = self.hub.find(&reference) else { return Ok(false) };
        Ok(snapshot.path().join(&reference.path).join("model_index.json").is_file())
    }

    /// What `name` stands for beside a checkpoint: a safetensors file, with its ending or without, or a folder, beneath
    /// a root. `field` is the part of the request in which the name stood.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, `model_not_found`, `unsafe_format`, `model_unsupported` and
    /// `model_corrupt` for what is found but cannot be used.
    pub fn component_file(&self, name: &str, field: &str) -> Result<ComponentFile> {
        if let Some(found) = self.beneath(name, field)? {
            return Ok(found);
        }
        match Reference::parse(name, field)?.filter(|reference| self.may_be_cached(reference)) {
            Some(reference) => self.cached_component_file(name, &reference),
            None => {
                let hint = "give the path of a safetensors file or a folder beneath the configured model roots";
                Err(Error::ModelNotFound { name: name.to_owned(), hint: Some(hint.to_owned()) })
            }
        }
    }

    /// [`Self::component_file`] of what lies beneath a root; `None` where nothing of this name does, whatever the hub may have.
    ///
    /// # Errors
    /// Those of [`Self::component_file`], but for `model_not_found`.
    pub fn beneath(&self, name: &str, field: &str) -> Result<Option<ComponentFile>> {
        let path = sound(name, field)?;
        let (mut refused, mut folder) = (None, None);
        let ended = path.with_added_extension("safetensors");
        for candidate in self.candidates(path).into_iter().chain(self.candidates(&ended)) {
            match admit(&self.roots, &candidate) {
                // A file of the same name may be meant.
                Ok(Some(real)) if real.is_dir() && !ComponentFile::is_network(&candidate, &self.roots) => {
                    folder.get_or_insert(candidate);
                }
                // By the name that was given: what a link leads to need not end as a file of weights does.
                Ok(Some(_)) => return ComponentFile::find(name, &candidate, &self.roots, self.mmap).map(Some),
                Ok(None) => {}
                Err(error) => refused = Some(error),
            }
        }
        match folder {
            Some(folder) if ComponentFile::is_hollow(&folder, &self.roots) => Ok(None),
            Some(folder) => ComponentFile::find(name, &folder, &self.roots, self.mmap).map(Some),
            None => refused.map_or(Ok(None), Err),
        }
    }

    fn locate(&mut self, name: &str) -> Result<Listed> {
        if name == demo::NAME {
            return Ok(Listed { name: name.to_owned(), path: None, cached: None });
        }
        let path = sound(name, "model")?;
        let (mut refused, mut folder) = (None, None);
        let ended = path.with_added_extension("safetensors");
        for candidate in self.candidates(path).into_iter().chain(self.candidates(&ended)) {
            match admit(&self.roots, &candidate) {
                Ok(Some(real)) if real.is_dir() => {
                    let listed = Listed { name: self.name_of(&real), path: Some(real), cached: None };
                    if candidate.join("model_index.json").is_file() {
                        return Ok(listed);
                    }
                    // A file of the same name may be meant.
                    folder.get_or_insert(listed);
                }
                Ok(Some(_)) => {
                    readable(name, &candidate)?;
                    return Ok(Listed { name: self.name_of(&candidate), path: Some(candidate), cached: None });
                }
                Ok(None) => {}
                Err(error) => refused = Some(error),
            }
        }
        match (folder, refused) {
            (Some(folder), _) => return Ok(folder),
            (None, Some(error)) => return Err(error),
            (None, None) => {}
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
        let path = snapshot.path().join(snapshot.resolve(&reference.path));
        let ended = path.with_added_extension("safetensors");
        for path in [path, ended] {
            let Some(real) = admit(&snapshot.roots(), &path)? else { continue };
            if !real.is_dir() {
                readable(&name, &path)?;
            }
            return Ok(Listed { name, path: Some(path), cached: Some(snapshot) });
        }
        Err(self.hub.missing(reference))
    }

    fn cached_component_file(&self, name: &str, reference: &Reference) -> Result<ComponentFile> {
        let Some(snapshot) = self.hub.find(reference)? else { return Err(self.hub.missing(reference)) };
        let whole = snapshot.path().join(&reference.path);
        // A folder brings its configuration along, so the file alone goes second.
        let path = match ComponentFile::find(name, &whole, &snapshot.roots(), self.mmap) {
            Err(_) if reference.is_whole() => snapshot.path().join(snapshot.resolve(&reference.path)),
            _ => whole,
        };
        let ended = path.with_added_extension("safetensors");
        for candidate in [path, ended] {
            if admit(&snapshot.roots(), &candidate)?.is_some() {
                return ComponentFile::find(name, &candidate, &snapshot.roots(), self.mmap);
            }
        }
        Err(self.hub.missing(reference))
    }

    /// Models in the cache of the hub that no folder beneath a root hides.
    fn list_cached(&mut self) -> Vec<Listed> {
        let references = self.hub.references().into_iter();
        let located = references.filter_map(|reference| self.locate(&reference.to_string()).ok());
        let located: Vec<Listed> = located.collect();
        let is_sdxl = |listed: &Listed| match (&listed.path, &listed.cached) {
            (Some(path), Some(snapshot)) => Checkpoint::claims_sdxl(path) || self.is_model(path, &snapshot.roots()),
            _ => false,
        };
        located.into_iter().filter(is_sdxl).collect()
    }

    /// The roots that exist, with every link resolved.
    pub(crate) fn real_roots(&self) -> Vec<PathBuf> {
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
        // A link keeps its own name, whatever it leads to.
        let folder = &match (folder.parent().and_then(real), folder.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => folder.to_owned(),
        };
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

    fn not_found(&mut self, name: &str) -> Error {
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
