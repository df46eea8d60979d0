//! Plans a `fetch` request: which files it downloads, and whether the cache already has them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::OneOrMany;
use crate::model::catalog::Catalog;
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Checkpoint;
use crate::model::hub::cache::home;
use crate::model::hub::fetch::pins::{mismatch, pinned};
use crate::model::hub::fetch::select::{is_weights, select};
use crate::model::hub::fetch::session::HubEndpoint;
use crate::model::hub::fetch::{Downloaded, Fetch, FetchTask};
use crate::model::hub::reference::{Reference, at_revision};
use crate::model::hub::sha256::Digest;
use crate::model::interface::{FetchRequest, Fetched, FetchedFile, HubSettings, Pins};
use crate::units::Bytes;

/// Most paths and patterns of one request, and the longest one in bytes.
const MOST: usize = 256;
const LONGEST: usize = 1024;
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Downloads the files of a request, except those in the cache at a fixed commit.
///
/// # Errors
/// `offline` if downloads are off; `invalid_parameter`, `path_not_allowed`; errors of [`Fetch`]: `model_not_found`,
/// `download_failed`, `unsafe_format`, and `model_corrupt` for a file without its pinned hash.
pub(crate) fn fetch(
    options: &FetchRequest,
    settings: &HubSettings,
    catalog: &Catalog,
    ctx: &Context,
) -> Result<Fetched> {
    let begun = Instant::now();
    let name = at_revision(Some(&options.model), options.revision.as_deref())?.unwrap_or_default();
    let Some(mut reference) = Reference::parse(&name, "model")? else {
        return Err(Error::invalid("model", "must be `owner/name` of a repository of the hub"));
    };
    let requested = reference.clone();
    let files = files(options, &mut reference)?;
    let query = CacheQuery { reference: &reference, files: &files, pins: options.sha256.as_ref() };
    let exact = !files.iter().any(|file| file.contains(['*', '?']));
    let cached = match !catalog.hub.download || (reference.is_fixed() && exact) {
        true => query.find(catalog, ctx)?,
        false => None,
    };
    let downloaded = match cached {
        Some(cached) => cached,
        None if !catalog.hub.download => {
            return Err(Error::Offline { what: format!("`model.fetch` of `{reference}`") });
        }
        None => {
            let hub = endpoint(settings, catalog)?;
            let task = FetchTask { hub: &hub, reference: &reference, files: &files, pins: query.pins };
            ctx.perform(&Fetch, task)?
        }
    };
    let Downloaded { commit, files } = downloaded;
    let sum = |wanted: &dyn Fn(&FetchedFile) -> bool| files.iter().filter(|file| wanted(file)).map(|f| f.bytes).sum();
    Ok(Fetched {
        model: model_name(&requested, &files).to_string(),
        revision: commit,
        bytes: sum(&|_| true),
        downloaded: sum(&|file| !file.cached),
        files,
        ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

/// The name of the downloaded model in requests: the repository, or its one downloaded file.
fn model_name(requested: &Reference, files: &[FetchedFile]) -> Reference {
    match files {
        [only] if is_weights(&only.name) => Reference { path: PathBuf::from(&only.name), ..requested.clone() },
        _ => requested.clone(),
    }
}

/// The paths and patterns of a request, including the path after the repository's name.
fn files(options: &FetchRequest, reference: &mut Reference) -> Result<Vec<String>> {
    let wrong = |message: String| Err(Error::invalid("files", message));
    let path = std::mem::take(&mut reference.path);
    let Some(OneOrMany(files)) = &options.files else {
        let path = path.to_str().filter(|path| !path.is_empty());
        return Ok(path.map(str::to_owned).into_iter().collect());
    };
    if !path.as_os_str().is_empty() {
        return wrong("cannot be given where `model` names a file".to_owned());
    }
    if files.is_empty() || files.len() > MOST {
        return wrong(format!("must be 1 to {MOST} paths or patterns, got {}", files.len()));
    }
    for file in files {
        if file.split('/').any(|part| part == "..") {
            return Err(Error::PathNotAllowed { path: PathBuf::from(file) });
        }
        if file.is_empty() || file.len() > LONGEST || file.starts_with('/') || file.contains(char::is_control) {
            return wrong(format!("must have paths in the repository, 1 to {LONGEST} bytes long"));
        }
    }
    Ok(files.clone())
}

/// A search of the cache for the files of a request.
struct CacheQuery<'a> {
    reference: &'a Reference,
    files: &'a [String],
    pins: Option<&'a Pins>,
}

impl CacheQuery<'_> {
    /// The files, if all of them are in the cache.
    fn find(&self, catalog: &Catalog, ctx: &Context) -> Result<Option<Downloaded>> {
        let Some(snapshot) = catalog.hub.find(self.reference)? else { return Ok(None) };
        let (path, roots) = (snapshot.path(), snapshot.roots());
        let is_complete = || {
            let name = self.reference.to_string();
            let own_file = path.join(snapshot.resolve(Path::new("")));
            Checkpoint::open_folder(&name, &path, &roots).is_ok()
                || ComponentFile::find(&name, &path, &roots, true).is_ok()
                || ComponentFile::find(&name, &own_file, &roots, true).is_ok()
        };
        if self.files.is_empty() && !is_complete() {
            return Ok(None);
        }
        let names = snapshot.files();
        let Ok(chosen) = select(&self.reference.repository, &names, self.files) else { return Ok(None) };
        let pinned = pinned(self.pins, &chosen)?;
        let mut files = Vec::with_capacity(chosen.len());
        for name in chosen {
            let file = roots.resolve(&path.join(&name), "files")?;
            let bytes = Bytes(fs::metadata(&file).map_or(0, |meta| meta.len()));
            let pin = pinned.iter().find(|(file, _)| *file == name);
            let sha256 = pin.map(|_| ctx.perform(&Digest, file.as_path())).transpose()?;
            if let (Some((_, pin)), Some(hash)) = (pin, &sha256)
                && pin != hash
            {
                return Err(mismatch(&name, hash, pin));
            }
            files.push(FetchedFile { name, bytes, cached: true, sha256 });
        }
        Ok(Some(Downloaded { commit: snapshot.commit, files }))
    }
}

fn endpoint(settings: &HubSettings, catalog: &Catalog) -> Result<HubEndpoint> {
    let failed = |message: String| Error::DownloadFailed { message };
    let endpoint = settings.endpoint.clone().or_else(|| env::var("HF_ENDPOINT").ok().filter(|text| !text.is_empty()));
    let endpoint = endpoint.unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()).trim_end_matches('/').to_owned();
    let cache = catalog.hub.folder().ok_or_else(|| failed("there is no folder for the cache of the hub".to_owned()))?;
    let cache = std::path::absolute(cache).map_err(|error| failed(format!("the cache has no path: {error}")))?;
    Ok(HubEndpoint { endpoint, token: token(settings)?, cache })
}

/// The access token, from the settings or the environment.
fn token(settings: &HubSettings) -> Result<Option<String>> {
    let read = |path: &Path| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let non_empty = |text: String| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
    if let Some(path) = &settings.token_file {
        let text = read(path).map_err(|error| Error::DownloadFailed {
            message: format!("cannot read the token file `{}`: {error}", path.display()),
        })?;
        return Ok(non_empty(text));
    }
    if let Some(token) = env::var("HF_TOKEN").ok().and_then(non_empty) {
        return Ok(Some(token));
    }
    let path = env::var_os("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home()?.join("token")));
    Ok(path.and_then(|path| read(&path).ok()).and_then(non_empty))
}
