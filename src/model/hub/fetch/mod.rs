//! Downloads files of one commit of a repository into the local cache, in the layout that Hugging Face's tools share:
//! `blobs/<etag>` holds the bytes, `snapshots/<commit>/<path>` links to them, `refs/<revision>` holds the commit. What is
//! begun lies in `blobs/<etag>.incomplete`, from where any of these tools goes on.

pub(crate) mod blob;
pub(crate) mod http;
pub(crate) mod select;

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;

pub(crate) use select::{is_weights, select};

use self::http::{Ask, Trouble, ask, pause};
use crate::context::{Context, Progress};
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::hub::reference::Reference;
use crate::model::hub::sha256::Digest;
use crate::model::interface::{FetchedFile, Pins};
use crate::units::Bytes;

/// Longest description of a repository.
const LISTING_LIMIT: usize = 32 << 20;
/// Files that a repository may have.
const MOST_FILES: usize = 100_000;
/// Longest path in a repository, in bytes.
const LONGEST_PATH: usize = 1024;
/// Failures in a row after which a download is given up, and the first pause between them.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
/// Least time between two events about the same file.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Where it is downloaded from, and where to.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    pub(crate) endpoint: String,
    pub(crate) token: Option<String>,
    /// The folder of the cache.
    pub(crate) cache: PathBuf,
}

pub(crate) struct FetchTask<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) reference: &'a Reference,
    /// Paths and patterns; empty for what a model consists of.
    pub(crate) files: &'a [String],
    pub(crate) pins: Option<&'a Pins>,
}

/// What a download gave.
pub(crate) struct Downloaded {
    pub(crate) commit: String,
    pub(crate) files: Vec<FetchedFile>,
}

/// The description of a commit, as far as it is used.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

/// Downloads what is not in the cache yet.
pub(crate) struct Fetch;

impl Worker<FetchTask<'_>> for Fetch {
    type Output = Downloaded;

    fn run(&self, task: FetchTask<'_>, ctx: &Context) -> Result<Downloaded> {
        let FetchTask { hub, reference, files, pins } = task;
        let session = Session::new(hub, reference, ctx)?;
        let listing = session.listing()?;
        let session = session.at(&listing.sha);
        let names: Vec<String> = listing.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let chosen = select(&reference.repository, &names, files)?;
        let pinned = pinned(pins, &chosen)?;
        let size = |name: &String| listing.siblings.iter().find(|sibling| sibling.rfilename == *name)?.size;
        let mut running_stats = RunningStats::new(chosen.iter().filter_map(size).sum(), ctx);
        let mut fetched = Vec::with_capacity(chosen.len());
        for name in &chosen {
            running_stats.begin(name, size(name));
            let pin = pinned.iter().find(|(of, _)| of == name).map(|(_, hash)| hash.as_str());
            fetched.push(session.file(name, pin, &mut running_stats)?);
        }
        session.refer()?;
        Ok(Downloaded { commit: listing.sha, files: fetched })
    }
}

/// The hashes that the chosen files must have, in lower case.
///
/// # Errors
/// `invalid_parameter` for what is no SHA-256, or of no file that was chosen.
pub(crate) fn pinned(pins: Option<&Pins>, chosen: &[String]) -> Result<Vec<(String, String)>> {
    let hash = |field: &str, text: &str| {
        let hash = text.trim().trim_start_matches("sha256:").to_lowercase();
        match hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            true => Ok(hash),
            false => Err(Error::invalid(field, "must be a SHA-256 of 64 hexadecimal digits")),
        }
    };
    match pins {
        None => Ok(Vec::new()),
        Some(Pins::One(text)) => {
            let weights: Vec<&String> = chosen.iter().filter(|name| select::is_weights(name)).collect();
            let only = match (chosen, weights.as_slice()) {
                ([only], _) => Some(only),
                (_, [only]) => Some(*only),
                _ => None,
            };
            match only {
                Some(only) => Ok(vec![(only.clone(), hash("sha256", text)?)]),
                None => {
                    let message = "must be an object of hashes by file where several files of weights are meant";
                    Err(Error::invalid("sha256", message))
                }
            }
        }
        Some(Pins::Each(hashes)) => {
            let one = |(name, text): (&String, &String)| match chosen.contains(name) {
                true => Ok((name.clone(), hash("sha256", text)?)),
                false => Err(Error::invalid("sha256", format!("names `{name}`, which is not among the files"))),
            };
            hashes.iter().map(one).collect()
        }
    }
}

/// One download: who is asked, for what, and where it goes.
struct Session<'a> {
    api: Api,
    endpoint: String,
    repo: Repo,
    cache: CacheRepo,
    /// The cache's folder, and that of the repository in it.
    home: &'a Path,
    folder: PathBuf,
    reference: &'a Reference,
    commit: String,
    ctx: &'a Context,
}

impl<'a> Session<'a> {
    fn new(hub: &'a Hub, reference: &'a Reference, ctx: &'a Context) -> Result<Self> {
        let cache = Cache::new(hub.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_progress(false)
            .with_endpoint(hub.endpoint.clone())
            .with_token(hub.token.clone())
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| Error::DownloadFailed { message: error.to_string() })?;
        let repo = Repo::with_revision(reference.repository.clone(), RepoType::Model, reference.wanted().to_owned());
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

    /// The same at the commit that the revision stands for: it may move while files are downloaded.
    fn at(self, commit: &str) -> Self {
        let repo = Repo::with_revision(self.reference.repository.clone(), RepoType::Model, commit.to_owned());
        Self { repo, commit: commit.to_owned(), ..self }
    }

    /// What the revision consists of.
    fn listing(&self) -> Result<Listing> {
        let url = format!("{}/api/{}?blobs=true", self.endpoint, self.repo.api_url());
        let body = self.patiently(|| {
            let answer = ask(&self.api, &self.repo, Ask { url: url.clone(), from: None, follow: true }, self.ctx)?;
            self.check(answer.head.status, "")?;
            answer.body(LISTING_LIMIT)
        })?;
        let unsound = |message: String| Error::DownloadFailed { message };
        let listing: Listing = serde_json::from_slice(&body)
            .map_err(|error| unsound(format!("the hub describes `{}` in an unknown form: {error}", self.reference)))?;
        if listing.sha.len() != 40 || !listing.sha.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(unsound(format!("the hub names no commit of `{}`", self.reference)));
        }
        if self.reference.is_fixed() && listing.sha != self.reference.wanted().to_lowercase() {
            return Err(unsound(format!("the hub answers with another commit than `{}`", self.reference)));
        }
        let unsafe_path = listing.siblings.iter().find(|sibling| !is_sound(&sibling.rfilename));
        if unsafe_path.is_some() || listing.siblings.len() > MOST_FILES {
            return Err(unsound(format!("the hub lists files of `{}` that no repository can have", self.reference)));
        }
        Ok(listing)
    }

    /// One file: from the cache if it is there, otherwise from the hub.
    fn file(&self, name: &str, pin: Option<&str>, running_stats: &mut RunningStats<'_>) -> Result<FetchedFile> {
        let place = self.cache.pointer_path(&self.commit).join(name);
        // What a link of the cache leads to is not looked into where it leads out of the repository's folder.
        let inside = |place: &Path| {
            let real = (place.canonicalize().ok()?, self.folder.canonicalize().ok()?);
            real.0.starts_with(&real.1).then_some(real.0)
        };
        if let Some(real) = inside(&place) {
            let bytes = fs::metadata(&real).map_or(0, |meta| meta.len());
            let sha256 = pin.map(|pin| self.verified(&real, name, pin)).transpose()?;
            running_stats.add(bytes);
            return Ok(FetchedFile { name: name.to_owned(), bytes: Bytes(bytes), cached: true, sha256 });
        }
        let begun = running_stats.done;
        let mut pause_for = PAUSE;
        let (mut failures, mut most) = (0, 0);
        running_stats.kept = 0;
        loop {
            running_stats.done = begun;
            match self.blob(name, pin, running_stats) {
                Ok(blob) => {
                    self.link(&blob.path, &place)?;
                    return Ok(blob.file);
                }
                Err(Trouble::End(error)) => return Err(error),
                Err(Trouble::Again(message)) => {
                    // Only what stays is progress: a server may send the same beginning for ever.
                    if running_stats.kept >= most + Bytes::MIB {
                        (failures, pause_for) = (0, PAUSE);
                    }
                    most = most.max(running_stats.kept);
                    failures += 1;
                    if failures >= TRIES {
                        return Err(Error::DownloadFailed { message: format!("`{name}`: {message}") });
                    }
                    tracing::debug!(name, message, "a download goes on after a pause");
                    pause(pause_for, self.ctx)?;
                    pause_for *= 2;
                }
            }
        }
    }

    /// Asks again where that may help.
    fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, Trouble>) -> Result<T> {
        let mut pause_for = PAUSE;
        for _ in 1..TRIES {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Trouble::End(error)) => return Err(error),
                Err(Trouble::Again(message)) => tracing::debug!(message, "the hub is asked again after a pause"),
            }
            pause(pause_for, self.ctx)?;
            pause_for *= 2;
        }
        attempt().map_err(|trouble| match trouble {
            Trouble::End(error) => error,
            Trouble::Again(message) => Error::DownloadFailed { message: format!("`{}`: {message}", self.reference) },
        })
    }

    /// What the status of an answer means.
    fn check(&self, status: u16, file: &str) -> Result<(), Trouble> {
        let name = format!("{}{}{file}", self.reference, if file.is_empty() { "" } else { "/" });
        let absent = |hint: &str| Error::ModelNotFound { name: name.clone(), hint: Some(hint.to_owned()) };
        match status {
            200..=399 => Ok(()),
            404 | 410 => Err(absent("the hub has no such repository, revision or file").into()),
            401 | 403 => Err(absent(&format!(
                "the hub answers {status}: there is no such repository, or it takes a token that may read it: \
                 `$HF_TOKEN`, or `hub.token_file`"
            ))
            .into()),
            408 | 429 | 500.. => Err(Trouble::Again(format!("the hub answers {status}"))),
            _ => Err(Error::DownloadFailed { message: format!("`{name}`: the hub answers {status}") }.into()),
        }
    }

    /// Fails unless the file has the hash.
    fn verified(&self, path: &Path, name: &str, pin: &str) -> Result<String> {
        let hash = self.ctx.perform(&Digest, path)?;
        if hash == pin { Ok(hash) } else { Err(mismatch(name, &hash, pin)) }
    }

    /// Puts a blob in its place in the snapshot.
    fn link(&self, blob: &Path, place: &Path) -> Result<()> {
        let failed = |error: std::io::Error| self.unwritten(place, &error);
        let folder = place.parent().unwrap_or(place);
        fs::create_dir_all(folder).map_err(failed)?;
        // The link is relative, so that the cache can be moved.
        let below = place.strip_prefix(&self.folder).unwrap_or(place).components().count() - 1;
        let up: PathBuf = std::iter::repeat_n("..", below).collect();
        let target = up.join(blob.strip_prefix(&self.folder).unwrap_or(blob));
        match fs::remove_file(place) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        #[cfg(unix)]
        let made = std::os::unix::fs::symlink(&target, place);
        #[cfg(not(unix))]
        let made = fs::copy(blob, place).map(drop);
        match made {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(failed),
        }
    }

    /// Notes which commit the revision stands for, now that it is here.
    fn refer(&self) -> Result<()> {
        if self.reference.is_fixed() {
            return Ok(());
        }
        let path = self.folder.join("refs").join(self.reference.wanted());
        let failed = |error: std::io::Error| self.unwritten(&path, &error);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(failed)?;
        // Whoever reads it meanwhile finds the old commit or the new one.
        let mut fresh = tempfile::Builder::new().prefix(".ref-").tempfile_in(folder).map_err(failed)?;
        std::io::Write::write_all(&mut fresh, self.commit.as_bytes()).map_err(failed)?;
        fresh.persist(&path).map(drop).map_err(|error| failed(error.error))
    }

    fn unwritten(&self, path: &Path, error: &std::io::Error) -> Error {
        Error::DownloadFailed { message: format!("`{}` in the cache: {error}", path.display()) }
    }
}

/// A file that is not the one that was asked for.
pub(crate) fn mismatch(name: &str, hash: &str, pin: &str) -> Error {
    let message = format!("has the SHA-256 {hash}, and {pin} is wanted");
    Error::ModelCorrupt { path: PathBuf::from(name), message }
}

/// Whether a path in a repository stays in it.
fn is_sound(path: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    (1..=LONGEST_PATH).contains(&path.len())
        && !path.contains(['\\', '\0'])
        && !path.contains(char::is_control)
        && !path.split('/').any(|part| matches!(part, "" | "." | "..") || part.len() > 255)
        && Path::new(path).components().all(plain)
}

/// How far a download is, and who is told.
struct RunningStats<'a> {
    name: String,
    done: u64,
    total: u64,
    /// Whether the total holds the file that is being downloaded.
    counted: bool,
    /// Bytes of the file that the last attempt left in the cache.
    kept: u64,
    told: Option<Instant>,
    ctx: &'a Context,
}

impl<'a> RunningStats<'a> {
    fn new(total: u64, ctx: &'a Context) -> Self {
        Self { name: String::new(), done: 0, total, counted: true, kept: 0, told: None, ctx }
    }

    fn begin(&mut self, name: &str, size: Option<u64>) {
        name.clone_into(&mut self.name);
        self.counted = size.is_some();
        self.tell();
    }

    /// What the hub says of the file's length as it sends it.
    fn expect(&mut self, size: u64) {
        if !std::mem::replace(&mut self.counted, true) {
            self.total += size;
        }
    }

    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told = Some(Instant::now());
        let (done, total) = (Bytes(self.done), Bytes(self.total.max(self.done)));
        self.ctx.progress(Progress::Fetching { file: self.name.clone(), bytes_done: done, bytes_total: total });
    }
}
