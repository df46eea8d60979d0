//! Requests that wait for a download. The compute lane hands a request back when a repository is missing, the hub lane
//! downloads it under the request's id, and the request is queued for the compute lane again.

use std::collections::HashMap;

use crate::error::Error;
use crate::model::interface::{FetchRequest, Request};
use crate::runtime::dispatch::Call;
use crate::runtime::lane::{Done, Job};

/// Most repositories that one request may have downloaded.
const MAX_DOWNLOADS: usize = 16;

#[derive(Default)]
pub(crate) struct PendingDownloads {
    waiting: HashMap<String, PendingDownload>,
}

#[derive(Default)]
struct PendingDownload {
    /// The request itself while it waits; none while it runs again.
    job: Option<Job>,
    /// Repositories downloaded for it so far.
    fetched: Vec<String>,
}

impl PendingDownloads {
    /// True if the request was handed back before.
    pub(crate) fn contains(&self, request_id: &str) -> bool {
        self.waiting.contains_key(request_id)
    }

    pub(crate) fn forget(&mut self, request_id: &str) {
        self.waiting.remove(request_id);
    }

    /// Keeps a request that is blocked on a repository, and gives the job that downloads it. `None` if the request is
    /// not blocked, or if that repository was downloaded before.
    pub(crate) fn begin_download(&mut self, done: &mut Done) -> Option<Job> {
        let (job, name) = done.unfetched.take()?;
        if job.cancel.is_cancelled() {
            done.result = Err(Error::Cancelled);
            return None;
        }
        let pending = self.waiting.entry(done.request_id.clone()).or_default();
        if pending.fetched.contains(&name) || pending.fetched.len() >= MAX_DOWNLOADS {
            return None;
        }
        pending.fetched.push(name.clone());
        let options = FetchRequest { model: name, revision: None, files: None, sha256: None };
        let fetch = Job { call: Call::Model(Request::Fetch(options)), preview: None, ..job.clone() };
        pending.job = Some(job);
        Some(fetch)
    }

    /// Gives back the request whose download has succeeded, if `done` is such a download.
    pub(crate) fn resume(&mut self, done: &mut Done) -> Option<Job> {
        let pending = self.waiting.get_mut(&done.request_id).filter(|_| done.result.is_ok())?;
        let job = pending.job.take()?;
        if job.cancel.is_cancelled() {
            done.result = Err(Error::Cancelled);
            return None;
        }
        Some(job)
    }
}
