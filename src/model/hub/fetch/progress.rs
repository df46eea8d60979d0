//! Progress events of a download.

use std::time::{Duration, Instant};

use crate::context::{Context, Progress};
use crate::units::Bytes;

/// Least time between two events about the same file.
const EVENT_INTERVAL: Duration = Duration::from_millis(100);

/// Bytes that have arrived, of all files of the request.
pub(crate) struct DownloadProgress<'a> {
    name: String,
    pub(crate) done: u64,
    total: u64,
    /// True if `total` includes the current file.
    counted: bool,
    /// Bytes of the current file that the last attempt left in the cache.
    pub(crate) kept: u64,
    last_event: Option<Instant>,
    ctx: &'a Context,
}

impl<'a> DownloadProgress<'a> {
    pub(crate) fn new(total: u64, ctx: &'a Context) -> Self {
        Self { name: String::new(), done: 0, total, counted: true, kept: 0, last_event: None, ctx }
    }

    pub(crate) fn begin(&mut self, name: &str, size: Option<u64>) {
        name.clone_into(&mut self.name);
        self.counted = size.is_some();
        self.report();
    }

    /// Adds the current file's length to the total, unless the listing gave it.
    pub(crate) fn expect(&mut self, size: u64) {
        if !std::mem::replace(&mut self.counted, true) {
            self.total += size;
        }
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.last_event.is_none_or(|at| at.elapsed() >= EVENT_INTERVAL) {
            self.report();
        }
    }

    fn report(&mut self) {
        self.last_event = Some(Instant::now());
        let (done, total) = (Bytes(self.done), Bytes(self.total.max(self.done)));
        self.ctx.progress(Progress::Fetching { file: self.name.clone(), bytes_done: done, bytes_total: total });
    }
}
