//! The context of a request below the lane: its id, cancellation, deadline, progress and timings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::units::Bytes;

/// Cancellation of a request, set by the event loop and read by the lane.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The stages of a generation, which are timed and announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Load,
    Encode,
    Denoise,
    Decode,
    Write,
}

impl Stage {
    /// The key under `timings_ms`, and the `stage` of events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Encode => "encode",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
            Self::Write => "write",
        }
    }
}

/// Progress of a running request.
#[derive(Clone, Debug)]
pub enum Progress {
    Stage {
        stage: Stage,
    },
    Step {
        stage: Stage,
        done: usize,
        total: usize,
    },
    ModelLoading {
        component: &'static str,
        bytes_done: Bytes,
        bytes_total: Bytes,
    },
    /// A file of a repository is being downloaded.
    Fetching {
        file: String,
        /// Bytes of all files so far.
        bytes_done: Bytes,
        /// Bytes of all files, as far as the hub has reported their sizes.
        bytes_total: Bytes,
    },
    /// A preview of the image after `step` steps, as PNG bytes.
    Preview {
        step: usize,
        png: Arc<[u8]>,
    },
    Image {
        index: usize,
        path: Option<String>,
        seed: u64,
    },
}

/// Frequency and size of previews.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreviewOptions {
    /// Steps between previews.
    pub every: usize,
    /// Longest side in pixels.
    pub max_side: usize,
}

/// Passed last, by reference, to every instructor, manager and worker.
pub struct Context {
    request_id: String,
    cancel: CancelToken,
    deadline: Option<Instant>,
    preview: Option<PreviewOptions>,
    sink: Box<dyn Fn(Progress) + Send + Sync>,
    timings: Mutex<Vec<(Stage, Duration)>>,
    warnings: Mutex<Vec<String>>,
    engine: Mutex<Option<Engine>>,
}

/// The device and number formats that computed a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    /// `cpu`, `cuda:0`, `metal`
    pub device: String,
    /// `f32`, `bf16`, `f16`
    pub dtype: &'static str,
    /// `none`, `int8`
    pub quantization: &'static str,
}

impl Context {
    #[must_use]
    pub fn new(
        request_id: String,
        cancel: CancelToken,
        deadline: Option<Instant>,
        preview: Option<PreviewOptions>,
        sink: Box<dyn Fn(Progress) + Send + Sync>,
    ) -> Self {
        Self {
            request_id,
            cancel,
            deadline,
            preview,
            sink,
            timings: Mutex::default(),
            warnings: Mutex::default(),
            engine: Mutex::default(),
        }
    }

    /// A context that is never cancelled and drops its progress, for tests and benches.
    #[must_use]
    pub fn detached() -> Self {
        Self::new("detached".to_owned(), CancelToken::default(), None, None, Box::new(|_| ()))
    }

    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    #[must_use]
    pub fn preview(&self) -> Option<PreviewOptions> {
        self.preview
    }

    /// Fails if the request has to end. It is called before every worker and every UNet evaluation.
    ///
    /// # Errors
    /// `cancelled` or `deadline_exceeded`.
    pub fn checkpoint(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Error::DeadlineExceeded);
        }
        Ok(())
    }

    /// Announces a stage, runs it, and adds its time to the request's timings.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn stage<T>(&self, stage: Stage, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.progress(Progress::Stage { stage });
        let start = Instant::now();
        let result = work();
        lock(&self.timings).push((stage, start.elapsed()));
        result
    }

    pub fn progress(&self, progress: Progress) {
        (self.sink)(progress);
    }

    /// Adds a warning for the client, although the request succeeds.
    pub fn warn(&self, message: impl Into<String>) {
        lock(&self.warnings).push(message.into());
    }

    /// Time per stage so far; repeated stages are summed.
    #[must_use]
    pub fn timings(&self) -> Vec<(Stage, Duration)> {
        let mut sums: Vec<(Stage, Duration)> = Vec::new();
        for &(stage, time) in lock(&self.timings).iter() {
            match sums.iter_mut().find(|(known, _)| *known == stage) {
                Some((_, sum)) => *sum += time,
                None => sums.push((stage, time)),
            }
        }
        sums
    }

    /// Sets the engine that computes this request.
    pub fn computed_by(&self, engine: Engine) {
        *lock(&self.engine) = Some(engine);
    }

    /// The engine that computed this request, if it used tensors.
    #[must_use]
    pub fn engine(&self) -> Option<Engine> {
        lock(&self.engine).clone()
    }

    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        lock(&self.warnings).clone()
    }
}

/// Locks a mutex. A panic elsewhere leaves no half-made change behind it, so a poisoned one is usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
