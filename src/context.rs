//! What travels with a request below the lane: its id, cancellation, deadline, progress and timings.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::units::Bytes;

/// Set from the I/O side, read by the compute thread.
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

/// The parts of a generation that are timed and announced.
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

/// What a running request says of itself.
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
    /// A picture of the image as it stands after `step` steps, PNG bytes.
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

/// How often a running request shows a picture of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreviewWish {
    pub every: usize,
    pub max_side: usize,
}

/// Travels last, by reference, through every instructor, manager and worker.
pub struct Context {
    request_id: String,
    cancel: CancelToken,
    deadline: Option<Instant>,
    preview: Option<PreviewWish>,
    sink: Box<dyn Fn(Progress)>,
    timings: RefCell<Vec<(Stage, Duration)>>,
    warnings: RefCell<Vec<String>>,
    engine: RefCell<Option<Engine>>,
}

/// What computed a request.
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
        preview: Option<PreviewWish>,
        sink: Box<dyn Fn(Progress)>,
    ) -> Self {
        Self {
            request_id,
            cancel,
            deadline,
            preview,
            sink,
            timings: RefCell::default(),
            warnings: RefCell::default(),
            engine: RefCell::default(),
        }
    }

    /// A context that is never cancelled and tells nobody: for tests and benches.
    #[must_use]
    pub fn detached() -> Self {
        Self::new("detached".to_owned(), CancelToken::default(), None, None, Box::new(|_| ()))
    }

    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    #[must_use]
    pub fn preview(&self) -> Option<PreviewWish> {
        self.preview
    }

    /// Called before every worker and every UNet evaluation.
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

    /// The only way to run a worker: checkpoint, tracing span, run.
    ///
    /// # Errors
    /// Those of [`Self::checkpoint`] and of the worker.
    pub fn perform<Task, W: Worker<Task> + ?Sized>(&self, worker: &W, task: Task) -> Result<W::Output> {
        self.checkpoint()?;
        let span = tracing::debug_span!("perform", worker = std::any::type_name::<W>());
        span.in_scope(|| worker.run(task, self))
    }

    /// Runs a part of the work, announces it, and adds its time to the request's timings.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn stage<T>(&self, stage: Stage, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.progress(Progress::Stage { stage });
        let start = Instant::now();
        let result = work();
        self.timings.borrow_mut().push((stage, start.elapsed()));
        result
    }

    pub fn progress(&self, progress: Progress) {
        (self.sink)(progress);
    }

    /// Something the caller should know although the request succeeds.
    pub fn warn(&self, message: impl Into<String>) {
        self.warnings.borrow_mut().push(message.into());
    }

    /// Time per stage so far; a stage that ran twice is summed.
    #[must_use]
    pub fn timings(&self) -> Vec<(Stage, Duration)> {
        let mut sums: Vec<(Stage, Duration)> = Vec::new();
        for &(stage, time) in self.timings.borrow().iter() {
            match sums.iter_mut().find(|(known, _)| *known == stage) {
                Some((_, sum)) => *sum += time,
                None => sums.push((stage, time)),
            }
        }
        sums
    }

    /// Says what computes this request.
    pub fn computed_by(&self, engine: Engine) {
        self.engine.replace(Some(engine));
    }

    /// What computed this request, if anything did.
    #[must_use]
    pub fn engine(&self) -> Option<Engine> {
        self.engine.borrow().clone()
    }

    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.borrow().clone()
    }
}
