//! Requests that wait for a download: the compute thread finds that a repository is missing and hands the request back,
//! the hub's thread downloads it under the request's id, and the request takes its turn again.

use std::collections::HashMap;
use std::time::Instant;

use crate::communication::dispatcher::{Floor, Post};
use crate::error::Error;
use crate::model::interface::{FetchRequest, Request};
use crate::runtime::dispatch::Call;
use crate::runtime::lane::{Done, Job};

/// Repositories that one request may have downloaded.
const MOST: usize = 16;

/// Who waits for what.
#[derive(Default)]
pub(crate) struct PendingDownloads {
    waiting: HashMap<String, PendingDownload>,
}

struct PendingDownload {
    /// The request itself while it waits; none while it is back at work.
    job: Option<Job>,
    /// What was downloaded for it.
    fetched: Vec<String>,
}

impl PendingDownloads {
    /// Whether a request was handed back before.
    pub(crate) fn holds(&self, id: &str) -> bool {
        self.waiting.contains_key(id)
    }

    pub(crate) fn forget(&mut self, id: &str) {
        self.waiting.remove(id);
    }
}

impl Floor {
    /// Has the repository downloaded without which a request cannot be done; `false` if none is missing, or if it was
    /// downloaded already.
    pub(crate) fn park(&mut self, done: &mut Done) -> bool {
        let Some((job, name)) = done.unfetched.take() else { return false };
        if job.cancel.is_cancelled() {
            done.result = Err(Error::Cancelled);
            return false;
        }
        let id = done.request_id.clone();
        let parked =
            self.parked.waiting.entry(id).or_insert_with(|| PendingDownload { job: None, fetched: Vec::new() });
        if parked.fetched.contains(&name) || parked.fetched.len() >= MOST {
            return false;
        }
        parked.fetched.push(name.clone());
        let options = FetchRequest { model: name, revision: None, files: None, sha256: None };
        let fetch = Job { call: Call::Model(Request::Fetch(options)), preview: None, ..job.clone() };
        parked.job = Some(job);
        self.take_turn(Post::Hub, fetch);
        true
    }

    /// Has a request take its turn again whose download has succeeded; `false` if there is none.
    pub(crate) fn unpark(&mut self, done: &mut Done) -> bool {
        let parked = self.parked.waiting.get_mut(&done.request_id).filter(|_| done.result.is_ok());
        let Some(job) = parked.and_then(|parked| parked.job.take()) else { return false };
        if job.cancel.is_cancelled() {
            done.result = Err(Error::Cancelled);
            return false;
        }
        self.take_turn(Post::Compute, job);
        true
    }

    /// Queues a job whose request was accepted before.
    fn take_turn(&mut self, post: Post, job: Job) {
        let mut priority = 0;
        // Until then it can be cancelled and can expire as whatever waits.
        if let Some(open) = self.ledger.get_mut(&job.request_id) {
            open.started = None;
            priority = open.priority;
        }
        self.station(post).queue.put_back(job, priority, Instant::now());
        self.pump(post);
    }
}
