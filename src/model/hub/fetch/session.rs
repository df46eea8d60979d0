//! The download of one repository: its listing, its files with retries, and the links and refs of the cache.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::hub::fetch::http::{HubError, HubRequest, send, sleep};
use crate::model::hub::fetch::pins::mismatch;
use crate::model::hub::fetch::progress::DownloadProgress;
use crate::model::hub::reference::Reference;
use crate::model::hub::sha256::Digest;
use crate::model::interface::FetchedFile;
use crate::units::Bytes;

/// Longest listing of a repository.
const LISTING_LIMIT: usize = 32 << 20;
/// Most files of a repository.
const MOST_FILES: usize = 100_000;
/// Longest path in a repository, in bytes.
const LONGEST_PATH: usize = 1024;
/// Attempts without progress before a download fails, and the delay after the first of them.
const TRIES: u32 = 4;
const FIRST_DELAY: Duration = Duration::from_millis(250);

/// Where to download from and to.
#[derive(Clone, Debug)]
pub(crate) struct HubEndpoint {
    pub(crate) endpoint: String,
    pub(crate) token: Option<String>,
    /// The folder of the cache.
    pub(crate) cache: PathBuf,
}

/// The files of a commit, as the hub's API lists them.
#[derive(Deserialize)]
pub(crate) struct RepositoryListing {
    pub(crate) sha: String,
    #[serde(default)]
    pub(crate) siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
pub(crate) struct Sibling {
    pub(crate) rfilename: String,
    pub(crate) size: Option<u64>,
}

/// The download of one repository into the cache.
pub(crate) struct DownloadSession<'a> {
    pub(crate) api: Api,
    pub(crate) endpoint: String,
    pub(crate) repo: Repo,
    pub(crate) cache: CacheRepo,
    /// The folder of the cache, and of the repository in it.
    pub(crate) home: &'a Path,
    pub(crate) folder: PathBuf,
    pub(crate) reference: &'a Reference,
    pub(crate) commit: String,
    pub(crate) ctx: &'a Context,
}

impl<'a> DownloadSession<'a> {
    pub(crate) fn new(hub: &'a HubEndpoint, reference: &'a Reference, ctx: &'a Context) -> Result<Self> {
        let cache = Cache::new(hub.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_progress(false)
            .with_endpoint(hub.endpoint.clone())
            .with_token(hub.token.clone())
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| Error::DownloadFailed { message: error.to_string() })?;
        let repo = Repo::with_revision(reference.repository.clone(), RepoType::Model, reference.revision().to_owned());
        Ok(Self {
            api,
            endpoint: hub.endpoint.clone(),
            folder: hub.cache.join(repo.folder_name()),
            cache: cache.repo(repo.clone()),
            home: &hub.cache,
            repo,
            reference,
            commit: String::new(),
            ctx,
        })
    }

    /// Fixes the session to a commit, since the revision may move while files are downloaded.
    pub(crate) fn at_commit(self, commit: &str) -> Self {
        let repo = Repo::with_revision(self.reference.repository.clone(), RepoType::Model, commit.to_owned());
        Self { repo, commit: commit.to_owned(), ..self }
    }

    /// The commit of the revision, and its files.
    pub(crate) fn listing(&self) -> Result<RepositoryListing> {
        let url = format!("{}/api/{}?blobs=true", self.endpoint, self.repo.api_url());
        let body = self.with_retries(|| {
            let request = HubRequest { url: url.clone(), from: None, follow: true };
            let response = send(&self.api, &self.repo, request, self.ctx)?;
            self.check_status(response.head.status, "")?;
            response.body(LISTING_LIMIT)
        })?;
        let failed = |message: String| Error::DownloadFailed { message };
        let listing: RepositoryListing = serde_json::from_slice(&body)
            .map_err(|error| failed(format!("the hub sends an invalid listing of `{}`: {error}", self.reference)))?;
        if listing.sha.len() != 40 || !listing.sha.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(failed(format!("the hub gives no commit of `{}`", self.reference)));
        }
        if self.reference.is_fixed() && listing.sha != self.reference.revision().to_lowercase() {
            return Err(failed(format!("the hub sends another commit than `{}`", self.reference)));
        }
        let unsafe_path = listing.siblings.iter().find(|sibling| !is_safe_path(&sibling.rfilename));
        if unsafe_path.is_some() || listing.siblings.len() > MOST_FILES {
            return Err(failed(format!("the hub lists invalid paths in `{}`", self.reference)));
        }
        Ok(listing)
    }

    /// One file: from the cache if it is there, otherwise downloaded, with retries.
    pub(crate) fn file(
        &self,
        name: &str,
        pin: Option<&str>,
        progress: &mut DownloadProgress<'_>,
    ) -> Result<FetchedFile> {
        let snapshot_path = self.cache.pointer_path(&self.commit).join(name);
        // A link that leaves the repository's folder is not followed.
        let real = snapshot_path.canonicalize().ok().zip(self.folder.canonicalize().ok());
        if let Some((real, _)) = real.filter(|(real, folder)| real.starts_with(folder)) {
            let bytes = fs::metadata(&real).map_or(0, |meta| meta.len());
            let sha256 = pin.map(|pin| self.verified(&real, name, pin)).transpose()?;
            progress.add(bytes);
            return Ok(FetchedFile { name: name.to_owned(), bytes: Bytes(bytes), cached: true, sha256 });
        }
        let done_before = progress.done;
        let mut delay = FIRST_DELAY;
        let (mut failures, mut most_kept) = (0, 0);
        progress.kept = 0;
        loop {
            progress.done = done_before;
            match self.blob(name, pin, progress) {
                Ok(blob) => {
                    self.link(&blob.path, &snapshot_path)?;
                    return Ok(blob.file);
                }
                Err(HubError::Fatal(error)) => return Err(error),
                Err(HubError::Transient(message)) => {
                    // Only bytes that stay count as progress: a server may send the same beginning for ever.
                    if progress.kept >= most_kept + Bytes::MIB {
                        (failures, delay) = (0, FIRST_DELAY);
                    }
                    most_kept = most_kept.max(progress.kept);
                    failures += 1;
                    if failures >= TRIES {
                        return Err(Error::DownloadFailed { message: format!("`{name}`: {message}") });
                    }
                    tracing::debug!(name, message, "the download is retried after a delay");
                    sleep(delay, self.ctx)?;
                    delay *= 2;
                }
            }
        }
    }

    /// Retries after transient failures.
    fn with_retries<T>(&self, mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T> {
        let mut delay = FIRST_DELAY;
        for _ in 1..TRIES {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(HubError::Fatal(error)) => return Err(error),
                Err(HubError::Transient(message)) => tracing::debug!(message, "the request is retried after a delay"),
            }
            sleep(delay, self.ctx)?;
            delay *= 2;
        }
        attempt().map_err(|error| match error {
            HubError::Fatal(error) => error,
            HubError::Transient(message) => {
                Error::DownloadFailed { message: format!("`{}`: {message}", self.reference) }
            }
        })
    }

    /// Translates an HTTP status into an error.
    pub(crate) fn check_status(&self, status: u16, file: &str) -> Result<(), HubError> {
        let name = format!("{}{}{file}", self.reference, if file.is_empty() { "" } else { "/" });
        let absent = |hint: &str| Error::ModelNotFound { name: name.clone(), hint: Some(hint.to_owned()) };
        match status {
            200..=399 => Ok(()),
            404 | 410 => Err(absent("the hub has no such repository, revision or file").into()),
            401 | 403 => Err(absent(&format!(
                "the hub answers {status}: there is no such repository, or it needs a token with access to it: \
                 `$HF_TOKEN`, or `hub.token_file`"
            ))
            .into()),
            408 | 429 | 500.. => Err(HubError::Transient(format!("the hub answers {status}"))),
            _ => Err(Error::DownloadFailed { message: format!("`{name}`: the hub answers {status}") }.into()),
        }
    }

    /// Fails if the file does not have the hash.
    pub(crate) fn verified(&self, path: &Path, name: &str, pin: &str) -> Result<String> {
        let hash = self.ctx.perform(&Digest, path)?;
        if hash == pin { Ok(hash) } else { Err(mismatch(name, &hash, pin)) }
    }

    /// Links a blob into the snapshot.
    fn link(&self, blob: &Path, link: &Path) -> Result<()> {
        let failed = |error: std::io::Error| cache_error(link, &error);
        let folder = link.parent().unwrap_or(link);
        fs::create_dir_all(folder).map_err(failed)?;
        // The link is relative, so that the cache can be moved.
        let below = link.strip_prefix(&self.folder).unwrap_or(link).components().count() - 1;
        let up: PathBuf = std::iter::repeat_n("..", below).collect();
        let target = up.join(blob.strip_prefix(&self.folder).unwrap_or(blob));
        match fs::remove_file(link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        #[cfg(unix)]
        let made = std::os::unix::fs::symlink(&target, link);
        #[cfg(not(unix))]
        let made = fs::copy(blob, link).map(drop);
        match made {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(failed),
        }
    }

    /// Writes the commit of the revision into `refs/`.
    pub(crate) fn write_ref(&self) -> Result<()> {
        if self.reference.is_fixed() {
            return Ok(());
        }
        let path = self.folder.join("refs").join(self.reference.revision());
        let failed = |error: std::io::Error| cache_error(&path, &error);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(failed)?;
        // The file is replaced at once, so that a concurrent reader finds the old commit or the new one.
        let mut fresh = tempfile::Builder::new().prefix(".ref-").tempfile_in(folder).map_err(failed)?;
        std::io::Write::write_all(&mut fresh, self.commit.as_bytes()).map_err(failed)?;
        fresh.persist(&path).map(drop).map_err(|error| failed(error.error))
    }
}

/// The error for a file of the cache that cannot be written.
pub(crate) fn cache_error(path: &Path, error: &std::io::Error) -> Error {
    Error::DownloadFailed { message: format!("`{}` in the cache: {error}", path.display()) }
}

/// True if a path cannot leave its repository.
fn is_safe_path(path: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    (1..=LONGEST_PATH).contains(&path.len())
        && !path.contains(['\\', '\0'])
        && !path.contains(char::is_control)
        && !path.split('/').any(|part| matches!(part, "" | "." | "..") || part.len() > 255)
        && Path::new(path).components().all(plain)
}
