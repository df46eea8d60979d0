//! A lane: one thread that owns its instructors and managers as plain fields and runs one job at a time.
//!
//! The queue lives above the lane, where a waiting job can still be cancelled, reordered or expire. Below it everything
//! blocks. After a panic the job fails and the managers are rebuilt; the process continues.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::context::{CancelToken, Context, Engine, PreviewOptions, Progress, Stage};
use crate::error::{Error, Result};
use crate::managers::{Managers, Published};
use crate::runtime::config;
use crate::runtime::dispatch::{Call, Instructors, Reply};

/// Stack of a lane's thread in bytes.
const STACK: usize = 16 << 20;

/// One call with its id, cancellation, deadline and previews.
#[derive(Clone, Debug)]
pub struct Job {
    pub request_id: String,
    pub call: Call,
    pub cancel: CancelToken,
    pub deadline: Option<Instant>,
    pub preview: Option<PreviewOptions>,
}

/// An event of a lane.
#[derive(Debug)]
pub enum LaneEvent {
    /// Instructors and managers are built.
    Ready,
    /// They could not be built, and the lane has ended.
    Unusable(Error),
    Progress {
        request_id: String,
        progress: Progress,
    },
    Done(Box<Done>),
}

/// The end of a job; every job has exactly one.
#[derive(Debug)]
pub struct Done {
    pub request_id: String,
    pub result: Result<Reply>,
    pub timings: Vec<(Stage, Duration)>,
    pub warnings: Vec<String>,
    pub engine: Option<Engine>,
    /// The job itself and the repository that it is blocked on.
    pub unfetched: Option<(Job, String)>,
}

/// Builds the instructors and managers of a lane. It is called on the lane's own thread, at its start and after a panic.
pub type Build = Arc<dyn Fn() -> Result<(Instructors, Managers)> + Send + Sync>;

/// The builds of the compute lane, which opens the device, and of the other lanes.
#[must_use]
pub fn builds(settings: config::InstructorSettings, published: Arc<Published>) -> (Build, Build) {
    let query = move || {
        let managers = Managers::new(&settings.model, Arc::clone(&published));
        Ok((Instructors::new(&settings)?, managers))
    };
    let build = query.clone();
    let compute = move || {
        let (instructors, mut managers) = build()?;
        instructors.inference.device.place(&mut managers.device, None)?;
        Ok((instructors, managers))
    };
    (Arc::new(compute), Arc::new(query))
}

/// The handle of a lane's thread, which ends when the handle is dropped and the last job is done.
pub struct Lane {
    jobs: mpsc::Sender<Job>,
}

impl Lane {
    /// # Errors
    /// The system's, if it is out of threads.
    pub fn spawn(
        name: &str,
        build: Build,
        notify: impl Fn(LaneEvent) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let thread = LaneThread { build, notify: Arc::new(notify) };
        std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || thread.run(&inbox))?;
        Ok(Self { jobs })
    }

    /// Gives the lane its next job.
    ///
    /// # Errors
    /// The job itself, if the lane has ended.
    pub fn submit(&self, job: Job) -> std::result::Result<(), Box<Job>> {
        self.jobs.send(job).map_err(|refused| Box::new(refused.0))
    }
}

/// The lane's thread itself.
struct LaneThread {
    build: Build,
    notify: Arc<dyn Fn(LaneEvent) + Send + Sync>,
}

impl LaneThread {
    fn run(&self, inbox: &mpsc::Receiver<Job>) {
        let mut resources = match self.build() {
            Ok(resources) => resources,
            Err(error) => return (self.notify)(LaneEvent::Unusable(error)),
        };
        (self.notify)(LaneEvent::Ready);
        while let Ok(job) = inbox.recv() {
            let (done, sound) = self.perform(job, &mut resources);
            if sound {
                (self.notify)(LaneEvent::Done(Box::new(done)));
                continue;
            }
            // Resources that a panic left half changed are not used again, and may panic once more when dropped.
            let fresh = self.build();
            (self.notify)(LaneEvent::Done(Box::new(done)));
            match fresh {
                Ok(fresh) => {
                    let broken = std::mem::replace(&mut resources, fresh);
                    drop(catch_unwind(AssertUnwindSafe(move || drop(broken))));
                }
                Err(error) => return (self.notify)(LaneEvent::Unusable(error)),
            }
        }
    }

    fn build(&self) -> Result<(Instructors, Managers)> {
        catch_unwind(AssertUnwindSafe(|| (self.build)())).unwrap_or_else(|panic| Err(bug(panic.as_ref())))
    }

    /// Runs a job. The flag is false if a panic left the resources in an unknown state.
    fn perform(&self, job: Job, (instructors, managers): &mut (Instructors, Managers)) -> (Done, bool) {
        // With downloads on, the job may be blocked on one.
        let kept = (managers.model().catalog.hub.download && job.call.downloads_missing()).then(|| job.clone());
        let Job { request_id, call, cancel, deadline, preview } = job;
        let notify = Arc::clone(&self.notify);
        let id = request_id.clone();
        let sink = Box::new(move |progress| notify(LaneEvent::Progress { request_id: id.clone(), progress }));
        let ctx = Context::new(request_id.clone(), cancel, deadline, preview, sink);
        let work = AssertUnwindSafe(|| {
            ctx.checkpoint()?;
            // A generation degrades by its own memory policy.
            let again = (!matches!(call, Call::Inference(_))).then(|| call.clone());
            match (instructors.dispatch(call, managers, &ctx), again) {
                // Memory kept for later requests may be enough for this one.
                (Err(Error::OutOfMemory { stage, needed, .. }), Some(again)) => {
                    let freed = managers.free_idle();
                    tracing::warn!(request_id, stage, ?needed, %freed, "out of memory; trying again after evicting everything");
                    ctx.warn(format!(
                        "memory ran out in {stage}; everything cached was evicted and the work started again"
                    ));
                    instructors.dispatch(again, managers, &ctx)
                }
                (result, _) => result,
            }
        });
        let (result, sound) = match catch_unwind(work) {
            Ok(result) => (result, true),
            Err(panic) => (Err(bug(panic.as_ref())), false),
        };
        let unfetched = match (&result, kept) {
            (Err(Error::Unfetched { name, .. }), Some(job)) => Some((job, name.clone())),
            _ => None,
        };
        let (timings, warnings, engine) = (ctx.timings(), ctx.warnings(), ctx.engine());
        (Done { request_id, result, timings, warnings, engine, unfetched }, sound)
    }
}

fn bug(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".to_owned());
    Error::bug(format!("panic: {text}"))
}
