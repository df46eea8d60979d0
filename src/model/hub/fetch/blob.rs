//! Downloads one file into `blobs/`: resumes an earlier attempt, and keeps only a file with the right hash.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::model::hub::fetch::http::{HubError, HubRequest, HubResponse, ResponseHead, send, sleep};
use crate::model::hub::fetch::pins::mismatch;
use crate::model::hub::fetch::progress::DownloadProgress;
use crate::model::hub::fetch::session::{DownloadSession, cache_error};
use crate::model::hub::sha256::{add_rest, digits};
use crate::model::interface::FetchedFile;
use crate::units::Bytes;

/// Interval at which the lock of another process is polled.
const LOCK_POLL: Duration = Duration::from_millis(200);
/// Redirects within the hub that are followed to find the file's etag.
const HOPS: usize = 5;

/// A file in `blobs/`.
pub(crate) struct Blob {
    pub(crate) path: PathBuf,
    pub(crate) file: FetchedFile,
}

/// The beginning of a file, in `<etag>.incomplete`.
struct PartialFile {
    path: PathBuf,
    /// The blob that it becomes.
    target: PathBuf,
    file: File,
    length: u64,
}

impl PartialFile {
    fn open(path: PathBuf, target: PathBuf) -> Result<Self, HubError> {
        let failed = |error: io::Error| HubError::Fatal(cache_error(&path, &error));
        if fs::symlink_metadata(&path).is_ok_and(|meta| !meta.is_file()) {
            fs::remove_file(&path).map_err(failed)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self { path, target, file, length })
    }

    fn failed(&self, error: &io::Error) -> HubError {
        cache_error(&self.target, error).into()
    }

    /// Empties the file, and fails so that the next attempt starts anew.
    fn restart<T>(&mut self, message: &str) -> Result<T, HubError> {
        self.truncate()?;
        Err(HubError::Transient(message.to_owned()))
    }

    fn truncate(&mut self) -> Result<(), HubError> {
        self.length = 0;
        self.file.set_len(0).map_err(|error| self.failed(&error))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.length += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|error| self.failed(&error))
    }

    fn seek(&mut self, position: u64) -> Result<(), HubError> {
        self.file.seek(SeekFrom::Start(position)).map(drop).map_err(|error| self.failed(&error))
    }

    /// Makes it the blob.
    fn finish(self) -> Result<(), HubError> {
        let renamed = self.file.sync_all().and_then(|()| fs::rename(&self.path, &self.target));
        renamed.map_err(|error| self.failed(&error))
    }

    fn remove(&self) -> Result<(), HubError> {
        fs::remove_file(&self.path).map_err(|error| self.failed(&error))
    }
}

impl DownloadSession<'_> {
    /// One attempt at a file.
    pub(crate) fn blob(
        &self,
        name: &str,
        pin: Option<&str>,
        progress: &mut DownloadProgress<'_>,
    ) -> Result<Blob, HubError> {
        let (url, etag, response) = self.look_up(name)?;
        let path = self.cache.blob_path(&etag);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(|error| HubError::Fatal(cache_error(&path, &error)))?;
        let _lock = self.lock(&etag)?;
        let file = |bytes: u64, cached: bool, sha256: Option<String>| FetchedFile {
            name: name.to_owned(),
            bytes: Bytes(bytes),
            cached,
            sha256,
        };
        if let Ok(meta) = fs::symlink_metadata(&path)
            && meta.is_file()
        {
            // Another commit or another process has downloaded it.
            let sha256 = pin.map(|pin| self.verified(&path, name, pin)).transpose()?;
            progress.add(meta.len());
            return Ok(Blob { file: file(meta.len(), true, sha256), path });
        }
        let mut partial = PartialFile::open(path.with_file_name(format!("{etag}.incomplete")), path.clone())?;
        let response = match response {
            Some(response) if partial.length == 0 => response,
            _ => {
                let from = (partial.length > 0).then_some(partial.length);
                send(&self.api, &self.repo, HubRequest { url, from, follow: true }, self.ctx)?
            }
        };
        let size = self.check_extent(name, &response.head, &mut partial)?;
        let resumed = partial.length > 0;
        let hash = self.receive(response, size, &mut partial, progress)?;
        // The etag of a large file is its hash.
        let is_hash = etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_hash && !etag.eq_ignore_ascii_case(&hash) {
            partial.remove()?;
            if resumed {
                return Err(HubError::Transient("the partial download was of another file".to_owned()));
            }
            let etag = etag.to_lowercase();
            let message = format!("`{name}` has the SHA-256 {hash}, and the hub gives {etag}");
            return Err(Error::DownloadFailed { message }.into());
        }
        if let Some(pin) = pin.filter(|pin| *pin != hash) {
            partial.remove()?;
            return Err(mismatch(name, &hash, pin).into());
        }
        let bytes = partial.length;
        partial.finish()?;
        Ok(Blob { file: file(bytes, false, Some(hash)), path })
    }

    /// Compares a response with the partial file, which is emptied if the response starts at the beginning. Returns the
    /// size of the whole file, if the hub gives it.
    fn check_extent(
        &self,
        name: &str,
        head: &ResponseHead,
        partial: &mut PartialFile,
    ) -> Result<Option<u64>, HubError> {
        if head.status == 416 {
            // Nothing follows the partial file: it is complete, which the hash will confirm, or too long.
            if head.header("content-range").and_then(whole_size) != Some(partial.length) {
                return partial.restart("the partial download does not fit the file");
            }
        } else {
            self.check_status(head.status, name)?;
            if head.is_redirect() {
                return Err(HubError::Transient("the hub redirects without end".to_owned()));
            }
        }
        let (start, size) = extent(head, partial.length);
        if start != partial.length {
            partial.truncate()?;
            if start != 0 {
                return Err(HubError::Transient("the hub sends another range than requested".to_owned()));
            }
        }
        if size.is_some_and(|size| partial.length > size) {
            return partial.restart("the partial download is longer than the file");
        }
        Ok(size)
    }

    /// Appends the body of a response to the partial file. Returns the SHA-256 of the whole file.
    fn receive(
        &self,
        mut response: HubResponse<'_>,
        size: Option<u64>,
        partial: &mut PartialFile,
        progress: &mut DownloadProgress<'_>,
    ) -> Result<String, HubError> {
        if let Some(size) = size {
            progress.expect(size);
        }
        let mut sum = Sha256::new();
        if partial.length > 0 {
            partial.seek(0)?;
            add_rest(&mut sum, &mut partial.file, self.ctx)?.map_err(|error| partial.failed(&error))?;
            progress.add(partial.length);
        }
        if response.head.status != 416 {
            partial.seek(partial.length)?;
            while let Some(bytes) = response.chunk()? {
                if size.is_some_and(|size| partial.length + bytes.len() as u64 > size) {
                    return partial.restart("the hub sends more bytes than the file has");
                }
                partial.append(&bytes)?;
                sum.update(&bytes);
                progress.kept = partial.length;
                progress.add(bytes.len() as u64);
            }
        }
        match size.filter(|size| *size != partial.length) {
            Some(size) => Err(HubError::Transient(format!("{} of {size} bytes arrived", partial.length))),
            None => Ok(digits(sum)),
        }
    }

    /// The URL and etag of a file, and the response with its bytes, unless the hub redirects to its storage.
    fn look_up(&self, name: &str) -> Result<(String, String, Option<HubResponse<'_>>), HubError> {
        let path = encoded(name);
        let mut url = format!("{}/{}/resolve/{}/{path}", self.endpoint, self.repo.url(), self.commit);
        for _ in 0..HOPS {
            let request = HubRequest { url: url.clone(), from: None, follow: false };
            let response = send(&self.api, &self.repo, request, self.ctx)?;
            self.check_status(response.head.status, name)?;
            if let Some(commit) = response.head.header("x-repo-commit")
                && commit != self.commit
            {
                return Err(
                    Error::DownloadFailed { message: format!("the hub sends `{name}` of another commit") }.into()
                );
            }
            let redirected = response.head.is_redirect();
            let etag = response.head.header("x-linked-etag").or(response.head.header("etag").filter(|_| !redirected));
            if let Some(etag) = etag {
                return Ok((url, valid_etag(etag, name)?, (!redirected).then_some(response)));
            }
            let next = response.head.header("location").and_then(|to| self.within(to)).filter(|_| redirected);
            url = next.ok_or_else(|| Error::DownloadFailed { message: format!("`{name}`: the hub gives no etag") })?;
        }
        Err(Error::DownloadFailed { message: format!("`{name}`: the hub redirects without end") }.into())
    }

    /// The target of a redirect, if it is on the hub's own host.
    fn within(&self, location: &str) -> Option<String> {
        let scheme = self.endpoint.find("://")? + 3;
        let host = self.endpoint.get(scheme..)?.find('/').map_or(self.endpoint.len(), |end| scheme + end);
        let origin = self.endpoint.get(..host)?;
        if location.starts_with('/') && !location.starts_with("//") {
            return Some(format!("{origin}{location}"));
        }
        location.strip_prefix(origin).is_some_and(|rest| rest.starts_with('/')).then(|| location.to_owned())
    }

    /// Waits until no other process downloads the file, with the lock that Hugging Face's tools use.
    fn lock(&self, etag: &str) -> Result<File, HubError> {
        let folder = self.home.join(".locks").join(self.repo.folder_name());
        let path = folder.join(format!("{etag}.lock"));
        let failed = |error: io::Error| HubError::Fatal(cache_error(&path, &error));
        fs::create_dir_all(&folder).map_err(failed)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => sleep(LOCK_POLL, self.ctx)?,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }
}

/// The offset at which a response begins, and the size of the whole file.
fn extent(head: &ResponseHead, have: u64) -> (u64, Option<u64>) {
    let range = head.header("content-range");
    match head.status {
        416 => (have, range.and_then(whole_size)),
        206 => {
            let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
            (start.unwrap_or(u64::MAX), range.and_then(whole_size))
        }
        _ => (0, head.header("content-length").and_then(|length| length.trim().parse().ok())),
    }
}

/// The size after the slash of `Content-Range`.
fn whole_size(range: &str) -> Option<u64> {
    range.rsplit_once('/')?.1.trim().parse().ok()
}

/// The etag of a file, which becomes a file name.
fn valid_etag(etag: &str, name: &str) -> Result<String> {
    let etag = etag.trim().trim_start_matches("W/").trim_matches('"');
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    match (1..=128).contains(&etag.len()) && etag.chars().all(known) {
        true => Ok(etag.to_owned()),
        false => Err(Error::DownloadFailed { message: format!("`{name}`: the hub gives an invalid etag") }),
    }
}

/// Percent-encodes a path.
fn encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/');
    path.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
