//! Finds models and component files by name, under the configured roots and in the hub's cache. It holds no weights, so
//! every lane can have one.

pub mod component_file;
pub mod demo;
pub(crate) mod files;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, nearest};
use crate::model::catalog::component_file::{ComponentFile, readable};
use crate::model::catalog::files::{ModelFolder, admit};
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

/// Limits on a search for models: folders, and levels below a root.
const FOLDERS: usize = 10_000;
const DEPTH: usize = 5;
/// Checkpoints whose configuration is cached.
const CACHED: usize = 16;

/// The models under the configured roots and in the hub's cache.
pub struct Catalog {
    folders: Vec<PathBuf>,
    roots: Roots,
    default: Option<String>,
    mmap: bool,
    /// Repositories by `owner/name`.
    pub hub: HubCache,
    /// Opened checkpoints, least recently used first.
    known: Vec<Arc<Checkpoint>>,
    /// True for safetensors files that are models, by the state of the file.
    probed: HashMap<CheckpointKey, bool>,
}

/// Components that the request names separately, each with its name.
pub type Separate<'a> = [(Part, Option<&'a str>)];

/// An available model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedModel {
    pub name: String,
    /// `None` for the embedded model.
    path: Option<PathBuf>,
    /// Its snapshot, for a model in the hub's cache.
    cached: Option<Snapshot>,
}

impl ListedModel {
    /// True if files of a cached repository are missing. A single cached file is not judged.
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
            probed: HashMap::new(),
        }
    }

    /// The model of requests without `model`.
    #[must_use]
    pub fn default_name(&self) -> &str {
        self.default.as_deref().unwrap_or(demo::NAME)
    }

    /// The checkpoint called `name`: `demo`, a path under a root, or `owner/name` of a repository in the hub's cache. `None`
    /// is the default model. A checkpoint whose files have changed is read again.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, `model_not_found` with the nearest name, `unsafe_format`,
    /// `model_unsupported` and `model_corrupt` for files that cannot be used.
    pub fn resolve(&mut self, name: Option<&str>) -> Result<Arc<Checkpoint>> {
        self.resolve_with(name, &[])
    }

    /// [`Self::resolve`], with components from other files.
    ///
    /// # Errors
    /// The errors of [`Self::resolve`], for the model and for each component, and `model_unsupported` if they do not fit together.
    pub fn resolve_with(&mut self, name: Option<&str>, separate: &Separate<'_>) -> Result<Arc<Checkpoint>> {
        let name = name.unwrap_or(self.default_name()).to_owned();
        let listed = self.locate(&name)?;
        let given = separate.iter().filter_map(|(part, name)| Some((*part, (*name)?)));
        let mut others = given.map(|(part, name)| Ok((part, self.part(part, name)?))).collect::<Result<Vec<_>>>()?;
        // The UNet sets the scale of the latents, unless a separate autoencoder, applied later, declares its own.
        others.sort_by_key(|(part, _)| *part);
        self.build(&listed, &others).map_err(|error| match listed.is_incomplete() {
            true if self.hub.download => Error::Unfetched { name: listed.name, otherwise: Some(Box::new(error)) },
            _ => error,
        })
    }

    /// The keys of every opened state of a model: with replaced components, and before its files changed.
    #[must_use]
    pub fn states(&self, name: &str) -> Vec<CheckpointKey> {
        self.known.iter().filter(|known| known.name == name).map(|known| known.key).collect()
    }

    /// The available models: `demo`, then the others by name.
    #[must_use]
    pub fn list(&mut self) -> Vec<ListedModel> {
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
                    found.push(ListedModel { name: self.name_of(&real), path: Some(real), cached: None });
                } else if depth < DEPTH {
                    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                        let path = entry.path();
                        if path.is_dir() {
                            waiting.push((path, depth + 1));
                        } else if seen.len() < FOLDERS && self.is_model(&path, &self.roots.clone()) {
                            // A link may lead to a file that is already listed.
                            let Ok(Some(real)) = admit(&self.roots, &path) else { continue };
                            if seen.insert(real) {
                                found.push(ListedModel { name: self.name_of(&path), path: Some(path), cached: None });
                            }
                        }
                    }
                }
            }
        }
        found.extend(self.list_cached());
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found.insert(0, ListedModel { name: demo::NAME.to_owned(), path: None, cached: None });
        found
    }

    /// Opens a listed model.
    ///
    /// # Errors
    /// The errors of [`Self::resolve`].
    pub fn checkpoint(&mut self, listed: &ListedModel) -> Result<Arc<Checkpoint>> {
        self.build(listed, &[])
    }

    fn build(&mut self, listed: &ListedModel, others: &[(Part, ComponentFile)]) -> Result<Arc<Checkpoint>> {
        // The embedded files never change.
        let is_demo = listed.path.is_none() && others.is_empty();
        let known = self.known.iter().find(|known| is_demo && known.is_demo());
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        let roots = &listed.cached.as_ref().map_or_else(|| self.roots.clone(), Snapshot::roots);
        let mut builder = match &listed.path {
            None => CheckpointBuilder::from_folder(demo::NAME, &ModelFolder::Embedded)?,
            Some(path) if path.is_dir() => CheckpointBuilder::from_folder(&listed.name, &self.folder(path, roots))?,
            Some(path) => {
                let (key, files) = self.single(path, roots)?;
                // Parsing a header with thousands of tensors takes long.
                if others.is_empty()
                    && let Some(index) =
                        self.known.iter().position(|known| known.key == key && known.name == listed.name)
                {
                    let known = self.known.remove(index);
                    self.known.push(Arc::clone(&known));
                    return Ok(known);
                }
                CheckpointBuilder::single(&listed.name, key, files)?
            }
        };
        others.iter().try_for_each(|(part, other)| builder.replace(*part, other))?;
        let mut checkpoint = builder.finish()?;
        checkpoint.mmap = self.mmap;
        checkpoint.revision = listed.cached.as_ref().map(|snapshot| snapshot.commit.clone());
        let index = self.known.iter().position(|known| known.key == checkpoint.key && known.name == checkpoint.name);
        let checkpoint = index.map_or_else(|| Arc::new(checkpoint), |index| self.known.remove(index));
        self.known.push(Arc::clone(&checkpoint));
        let excess = self.known.len().saturating_sub(CACHED);
        self.known.drain(..excess);
        Ok(checkpoint)
    }

    fn folder(&self, path: &Path, roots: &Roots) -> ModelFolder {
        ModelFolder::Disk { path: path.to_owned(), roots: roots.clone() }
    }

    /// A single file, with the key of its state.
    fn single(&self, path: &Path, roots: &Roots) -> Result<(CheckpointKey, WeightFiles)> {
        let folder = self.folder(path.parent().unwrap_or(path), roots);
        let found = folder.need(&path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default())?;
        Ok((key(&folder, std::slice::from_ref(&found)), WeightFiles::new(vec![found])))
    }

    /// True if a file is a model, judging by its header.
    fn is_model(&mut self, path: &Path, roots: &Roots) -> bool {
        if path.extension().is_none_or(|end| end != "safetensors") {
            return false;
        }
        let Ok((key, files)) = self.single(path, roots) else { return false };
        if let Some(known) = self.probed.get(&key) {
            return *known;
        }
        let is = files.files.first().is_some_and(|file| look(file).is_ok_and(|weights| is_sdxl(&weights)));
        if self.probed.len() > FOLDERS {
            self.probed.clear();
        }
        self.probed.insert(key, is);
        is
    }

    /// The file or folder that a request names for a component. In a diffusers model it is the component's folder.
    fn part(&self, part: Part, name: &str) -> Result<ComponentFile> {
        let path = checked_path(name, part.name())?;
        let own = path.join(part.name());
        let whole = |candidate: PathBuf| candidate.join("model_index.json").is_file();
        let whole = self.candidates(path).into_iter().any(whole) || self.is_cached_model(path, part)?;
        let name = if whole { &own } else { path };
        self.component_file(&name.to_string_lossy(), part.name())
    }

    /// True if a name without a match under a root is a diffusers model in the hub's cache.
    fn is_cached_model(&self, path: &Path, part: Part) -> Result<bool> {
        let with_extension = path.with_added_extension("safetensors");
        if self.candidates(path).into_iter().chain(self.candidates(&with_extension)).any(|candidate| candidate.exists())
        {
            return Ok(false);
        }
        let Some(reference) = Reference::parse(&path.to_string_lossy(), part.name())? else { return Ok(false) };
        let Ok(Some(snapshot)) = self.hub.find(&reference) else { return Ok(false) };
        Ok(snapshot.path().join(&reference.path).join("model_index.json").is_file())
    }

    /// The component file called `name`: a safetensors file, with or without its extension, or a folder. `field` is the
    /// request field, for messages.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, `model_not_found`, `unsafe_format`, `model_unsupported` and
    /// `model_corrupt` for files that cannot be used.
    pub fn component_file(&self, name: &str, field: &str) -> Result<ComponentFile> {
        if let Some(found) = self.find_under_roots(name, field)? {
            return Ok(found);
        }
        match Reference::parse(name, field)?.filter(|reference| self.may_be_cached(reference)) {
            Some(reference) => self.cached_component_file(name, &reference),
            None => {
                let hint = "give the path of a safetensors file or a folder under the configured model roots";
                Err(Error::ModelNotFound { name: name.to_owned(), hint: Some(hint.to_owned()) })
            }
        }
    }

    /// [`Self::component_file`], without the hub's cache; `None` if nothing under a root has this name.
    ///
    /// # Errors
    /// The errors of [`Self::component_file`], except `model_not_found`.
    pub fn find_under_roots(&self, name: &str, field: &str) -> Result<Option<ComponentFile>> {
        let path = checked_path(name, field)?;
        let (mut refused, mut folder) = (None, None);
        let with_extension = path.with_added_extension("safetensors");
        for candidate in self.candidates(path).into_iter().chain(self.candidates(&with_extension)) {
            match admit(&self.roots, &candidate) {
                // A file of the same name takes precedence.
                Ok(Some(real)) if real.is_dir() && !ComponentFile::is_network(&candidate, &self.roots) => {
                    folder.get_or_insert(candidate);
                }
                // The given name decides: the target of a link may have another extension.
                Ok(Some(_)) => return ComponentFile::find(name, &candidate, &self.roots, self.mmap).map(Some),
                Ok(None) => {}
                Err(error) => refused = Some(error),
            }
        }
        match folder {
            Some(folder) if ComponentFile::is_not_a_network(&folder, &self.roots) => Ok(None),
            Some(folder) => ComponentFile::find(name, &folder, &self.roots, self.mmap).map(Some),
            None => refused.map_or(Ok(None), Err),
        }
    }

    fn locate(&mut self, name: &str) -> Result<ListedModel> {
        if name == demo::NAME {
            return Ok(ListedModel { name: name.to_owned(), path: None, cached: None });
        }
        let path = checked_path(name, "model")?;
        let (mut refused, mut folder) = (None, None);
        let with_extension = path.with_added_extension("safetensors");
        for candidate in self.candidates(path).into_iter().chain(self.candidates(&with_extension)) {
            match admit(&self.roots, &candidate) {
                Ok(Some(real)) if real.is_dir() => {
                    let listed = ListedModel { name: self.name_of(&real), path: Some(real), cached: None };
                    if candidate.join("model_index.json").is_file() {
                        return Ok(listed);
                    }
                    // A file of the same name takes precedence.
                    folder.get_or_insert(listed);
                }
                Ok(Some(_)) => {
                    readable(name, &candidate)?;
                    return Ok(ListedModel { name: self.name_of(&candidate), path: Some(candidate), cached: None });
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

    /// True if a name may be a repository: a folder of the same name under a root takes precedence.
    fn may_be_cached(&self, reference: &Reference) -> bool {
        let owner = reference.repository.split('/').next().unwrap_or_default();
        matches!(self.hub.find(reference), Ok(Some(_)) | Err(_))
            || !self.real_roots().iter().any(|root| root.join(owner).is_dir())
    }

    fn locate_cached(&self, reference: &Reference) -> Result<ListedModel> {
        let name = reference.to_string();
        let Some(snapshot) = self.hub.find(reference)? else { return Err(self.hub.missing(reference)) };
        let path = snapshot.path().join(snapshot.resolve(&reference.path));
        let with_extension = path.with_added_extension("safetensors");
        for path in [path, with_extension] {
            let Some(real) = admit(&snapshot.roots(), &path)? else { continue };
            if !real.is_dir() {
                readable(&name, &path)?;
            }
            return Ok(ListedModel { name, path: Some(path), cached: Some(snapshot) });
        }
        Err(self.hub.missing(reference))
    }

    fn cached_component_file(&self, name: &str, reference: &Reference) -> Result<ComponentFile> {
        let Some(snapshot) = self.hub.find(reference)? else { return Err(self.hub.missing(reference)) };
        let folder = snapshot.path().join(&reference.path);
        // A folder has its configuration, so it comes before the single file.
        let path = match ComponentFile::find(name, &folder, &snapshot.roots(), self.mmap) {
            Err(_) if reference.is_whole() => snapshot.path().join(snapshot.resolve(&reference.path)),
            _ => folder,
        };
        let with_extension = path.with_added_extension("safetensors");
        for candidate in [path, with_extension] {
            if admit(&snapshot.roots(), &candidate)?.is_some() {
                return ComponentFile::find(name, &candidate, &snapshot.roots(), self.mmap);
            }
        }
        Err(self.hub.missing(reference))
    }

    /// Models in the hub's cache, except those whose name a folder under a root has.
    fn list_cached(&mut self) -> Vec<ListedModel> {
        let references = self.hub.references().into_iter();
        let located = references.filter_map(|reference| self.locate(&reference.to_string()).ok());
        let located: Vec<ListedModel> = located.collect();
        let is_sdxl = |listed: &ListedModel| match (&listed.path, &listed.cached) {
            (Some(path), Some(snapshot)) => Checkpoint::claims_sdxl(path) || self.is_model(path, &snapshot.roots()),
            _ => false,
        };
        located.into_iter().filter(is_sdxl).collect()
    }

    /// The existing roots, with links resolved.
    pub(crate) fn real_roots(&self) -> Vec<PathBuf> {
        self.folders.iter().filter_map(|root| fs::canonicalize(root).ok()).collect()
    }

    /// The paths that a name may stand for: under each root, a root of that name, or from the working directory into a root.
    fn candidates(&self, path: &Path) -> Vec<PathBuf> {
        if path.is_absolute() {
            return vec![path.to_owned()];
        }
        let roots = self.real_roots();
        let mut candidates: Vec<PathBuf> = roots.iter().map(|root| root.join(path)).collect();
        candidates.extend(roots.iter().filter(|root| root.file_name() == Some(path.as_os_str())).cloned());
        let here = std::path::absolute(path).ok();
        candidates.extend(here.filter(|here| self.roots.resolve(here, "model").is_ok()));
        candidates
    }

    /// The path relative to a root, if that name resolves to the folder; otherwise the absolute path.
    fn name_of(&self, folder: &Path) -> String {
        let real = |path: &Path| fs::canonicalize(path).ok();
        // A link keeps its own name.
        let folder = &match (folder.parent().and_then(real), folder.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => folder.to_owned(),
        };
        for root in self.real_roots() {
            let Ok(below) = folder.strip_prefix(&root) else { continue };
            let name = if below.as_os_str().is_empty() { root.file_name().map(Path::new) } else { Some(below) };
            let Some(name) = name else { continue };
            let target = self.candidates(name).into_iter().find(|path| path.exists());
            if target.and_then(|path| real(&path)) == real(folder) && name != Path::new(demo::NAME) {
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
            None => "`model.list` names every model under the configured roots".to_owned(),
        };
        Error::ModelNotFound { name: name.to_owned(), hint: Some(hint) }
    }
}

/// Checks that a name may be a path.
fn checked_path<'a>(name: &'a str, field: &str) -> Result<&'a Path> {
    if name.trim().is_empty() || name.contains('\0') {
        return Err(Error::invalid(field, "must be the name of a model or a path, got neither"));
    }
    let path = Path::new(name);
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(Error::PathNotAllowed { path: path.to_owned() });
    }
    Ok(path)
}
