//! One file from the hub into `blobs/`, from where an earlier attempt ended, and only what has the right hash.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::model::hub::fetch::http::{Answer, Ask, Head, Trouble, ask, pause};
use crate::model::hub::fetch::{RunningStats, Session, mismatch};
use crate::model::hub::sha256::{add_rest, digits};
use crate::model::interface::FetchedFile;
use crate::units::Bytes;

/// How often it is looked whether another process has done with a file.
const LOOK: Duration = Duration::from_millis(200);
/// Redirections within the hub that are followed to find what names a file.
const HOPS: usize = 5;

/// A file in `blobs/`.
pub(crate) struct Blob {
    pub(crate) path: PathBuf,
    pub(crate) file: FetchedFile,
}

impl Session<'_> {
    /// One attempt at a file.
    pub(crate) fn blob(
        &self,
        name: &str,
        pin: Option<&str>,
        running_stats: &mut RunningStats<'_>,
    ) -> Result<Blob, Trouble> {
        let (url, etag, answer) = self.look_up(name)?;
        let path = self.cache.blob_path(&etag);
        // A name of this form is the hash of a large file.
        let own = Some(etag.as_str()).filter(|etag| etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()));
        let own = own.map(str::to_lowercase);
        let failed = |error: io::Error| Trouble::End(self.unwritten(&path, &error));
        fs::create_dir_all(path.parent().unwrap_or(&path)).map_err(failed)?;
        let _lock = self.lock(&etag)?;
        let described = |bytes: u64, cached: bool, sha256: Option<String>| FetchedFile {
            name: name.to_owned(),
            bytes: Bytes(bytes),
            cached,
            sha256,
        };
        if let Ok(meta) = fs::symlink_metadata(&path)
            && meta.is_file()
        {
            // Another commit, or another process, has brought it.
            let sha256 = pin.map(|pin| self.verified(&path, name, pin)).transpose()?;
            running_stats.add(meta.len());
            return Ok(Blob { file: described(meta.len(), true, sha256), path });
        }
        let part = path.with_file_name(format!("{etag}.incomplete"));
        if fs::symlink_metadata(&part).is_ok_and(|meta| !meta.is_file()) {
            fs::remove_file(&part).map_err(failed)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&part);
        let file = file.as_mut().map_err(|error| Trouble::End(self.unwritten(&part, error)))?;
        let mut have = file.metadata().map_err(failed)?.len();
        let mut answer = match answer {
            Some(answer) if have == 0 => answer,
            _ => {
                let from = (have > 0).then_some(have);
                ask(&self.api, &self.repo, Ask { url, from, follow: true }, self.ctx)?
            }
        };
        if answer.head.status == 416 {
            // There is nothing after what is here: too much is, or all of it and the hash will tell.
            let whole = answer.head.get("content-range").and_then(whole_of);
            if whole != Some(have) {
                file.set_len(0).map_err(failed)?;
                return Err(Trouble::Again("what was begun does not fit the file".to_owned()));
            }
        } else {
            self.check(answer.head.status, name)?;
            if answer.head.is_redirection() {
                return Err(Trouble::Again("the hub redirects without end".to_owned()));
            }
        }
        let (start, size) = extent(&answer.head, have);
        if start != have {
            have = 0;
            file.set_len(0).map_err(failed)?;
            if start != 0 {
                return Err(Trouble::Again("the hub sends another part than was asked for".to_owned()));
            }
        }
        if size.is_some_and(|size| have > size) {
            file.set_len(0).map_err(failed)?;
            return Err(Trouble::Again("more was begun than the file has".to_owned()));
        }
        if let Some(size) = size {
            running_stats.expect(size);
        }
        let mut sum = Sha256::new();
        let resumed = have > 0;
        if resumed {
            file.seek(SeekFrom::Start(0)).map_err(failed)?;
            add_rest(&mut sum, file, self.ctx)?.map_err(failed)?;
            running_stats.add(have);
        }
        if answer.head.status != 416 {
            file.seek(SeekFrom::Start(have)).map_err(failed)?;
            while let Some(bytes) = answer.chunk()? {
                have += bytes.len() as u64;
                if size.is_some_and(|size| have > size) {
                    file.set_len(0).map_err(failed)?;
                    return Err(Trouble::Again("more came than the file has".to_owned()));
                }
                file.write_all(&bytes).map_err(failed)?;
                sum.update(&bytes);
                running_stats.kept = have;
                running_stats.add(bytes.len() as u64);
            }
        }
        if let Some(size) = size.filter(|size| *size != have) {
            return Err(Trouble::Again(format!("{have} of {size} bytes came")));
        }
        let hash = digits(sum);
        if let Some(own) = own.filter(|own| *own != hash) {
            fs::remove_file(&part).map_err(failed)?;
            if resumed {
                return Err(Trouble::Again("what was begun is another file's".to_owned()));
            }
            let message = format!("`{name}` came with the SHA-256 {hash}, and the hub says {own}");
            return Err(Error::DownloadFailed { message }.into());
        }
        if let Some(pin) = pin.filter(|pin| *pin != hash) {
            fs::remove_file(&part).map_err(failed)?;
            return Err(mismatch(name, &hash, pin).into());
        }
        file.sync_all().map_err(failed)?;
        fs::rename(&part, &path).map_err(failed)?;
        Ok(Blob { file: described(have, false, Some(hash)), path })
    }

    /// The address of a file, the name of its blob, and the answer that brings its bytes, if the hub has them itself
    /// and does not redirect to where it stores them.
    fn look_up(&self, name: &str) -> Result<(String, String, Option<Answer<'_>>), Trouble> {
        let path = encoded(name);
        let mut url = format!("{}/{}/resolve/{}/{path}", self.endpoint, self.repo.url(), self.commit);
        for _ in 0..HOPS {
            let answer = ask(&self.api, &self.repo, Ask { url: url.clone(), from: None, follow: false }, self.ctx)?;
            self.check(answer.head.status, name)?;
            if let Some(commit) = answer.head.get("x-repo-commit")
                && commit != self.commit
            {
                return Err(Error::DownloadFailed { message: format!("`{name}` came of another commit") }.into());
            }
            let redirected = answer.head.is_redirection();
            let said = answer.head.get("x-linked-etag").or(answer.head.get("etag").filter(|_| !redirected));
            if let Some(said) = said {
                return Ok((url, sound_etag(said, name)?, (!redirected).then_some(answer)));
            }
            let near = answer.head.get("location").and_then(|to| self.within(to)).filter(|_| redirected);
            url = near.ok_or_else(|| Error::DownloadFailed {
                message: format!("`{name}`: the hub does not say what names the file"),
            })?;
        }
        Err(Error::DownloadFailed { message: format!("`{name}`: the hub redirects without end") }.into())
    }

    /// The address that a redirection leads to, if it stays with the hub.
    fn within(&self, location: &str) -> Option<String> {
        let scheme = self.endpoint.find("://")? + 3;
        let host = self.endpoint.get(scheme..)?.find('/').map_or(self.endpoint.len(), |end| scheme + end);
        let origin = self.endpoint.get(..host)?;
        if location.starts_with('/') && !location.starts_with("//") {
            return Some(format!("{origin}{location}"));
        }
        location.strip_prefix(origin).is_some_and(|rest| rest.starts_with('/')).then(|| location.to_owned())
    }

    /// Waits until no other process downloads the file, as Hugging Face's tools do.
    fn lock(&self, etag: &str) -> Result<File, Trouble> {
        let folder = self.home.join(".locks").join(self.repo.folder_name());
        let path = folder.join(format!("{etag}.lock"));
        let failed = |error: io::Error| Trouble::End(self.unwritten(&path, &error));
        fs::create_dir_all(&folder).map_err(failed)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => pause(LOOK, self.ctx)?,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }
}

/// Where the bytes of an answer begin, and the length of the whole file.
fn extent(head: &Head, have: u64) -> (u64, Option<u64>) {
    let range = head.get("content-range");
    match head.status {
        416 => (have, range.and_then(whole_of)),
        206 => {
            let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
            (start.unwrap_or(u64::MAX), range.and_then(whole_of))
        }
        _ => (0, head.get("content-length").and_then(|length| length.trim().parse().ok())),
    }
}

/// The length after the slash of `Content-Range`.
fn whole_of(range: &str) -> Option<u64> {
    range.rsplit_once('/')?.1.trim().parse().ok()
}

/// What names the file's blob, which becomes the name of a file.
fn sound_etag(said: &str, name: &str) -> Result<String> {
    let etag = said.trim().trim_start_matches("W/").trim_matches('"');
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    match (1..=128).contains(&etag.len()) && etag.chars().all(known) {
        true => Ok(etag.to_owned()),
        false => Err(Error::DownloadFailed { message: format!("`{name}`: the hub names it in an unknown form") }),
    }
}

/// A path as it stands in an address.
fn encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/');
    path.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
