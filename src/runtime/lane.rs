//! A compute thread: owns its managers and instructors as plain fields and does one job at a time.
//!
//! The queue lives above the lane, where a waiting job can still be cancelled, reordered or expire. Below it everything
//! blocks. A panic costs the job and the managers, which are built anew, not the process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::context::{CancelToken, Context, Engine, PreviewOptions, Progress, Stage};
use crate::error::{Error, Result};
use crate::managers::Managers;
use crate::model::managers::Reach;
use crate::runtime::dispatch::{Call, Instructors, Reply};
use crate::units::Bytes;

/// Stack of a compute thread in bytes.
const STACK: usize = 16 << 20;

/// One call with everything that travels with it.
#[derive(Clone, Debug)]
pub struct Job {
    pub request_id: String,
    pub call: Call,
    pub cancel: CancelToken,
    pub deadline: Option<Instant>,
    pub preview: Option<PreviewOptions>,
}

/// What a lane says.
#[derive(Debug)]
pub enum Event {
    /// Managers and instructors stand.
    Ready,
    /// They cannot be built; the lane has ended.
    Unusable(Error),
    Progress {
        request_id: String,
        progress: Progress,
    },
    Done(Box<Done>),
}

/// The end of a job; exactly one for each.
#[derive(Debug)]
pub struct Done {
    pub request_id: String,
    pub result: Result<Reply>,
    pub timings: Vec<(Stage, Duration)>,
    pub warnings: Vec<String>,
    pub engine: Option<Engine>,
    /// The job again, and the repository that must be downloaded before it can be done.
    pub unfetched: Option<(Job, String)>,
}

/// Makes what a lane owns; called on the lane's own thread, at its start and after a panic.
pub type Build = Arc<dyn Fn() -> Result<(Instructors, Managers)> + Send + Sync>;

/// The handle of a compute thread, which ends when the handle is dropped and its last job done.
pub struct Lane {
    jobs: mpsc::Sender<Job>,
}

impl Lane {
    /// # Errors
    /// The system's, when it has no thread to give.
    pub fn spawn(name: &str, build: Build, tell: impl Fn(Event) + Send + Sync + 'static) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let bench = LaneThread { build, tell: Arc::new(tell) };
        std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || bench.work(&inbox))?;
        Ok(Self { jobs })
    }

    /// Gives the lane its next job. `Err` hands it back when the lane has ended.
    ///
    /// # Errors
    /// The job itself.
    pub fn submit(&self, job: Job) -> std::result::Result<(), Box<Job>> {
        self.jobs.send(job).map_err(|refused| Box::new(refused.0))
    }
}

/// The thread's own side.
struct LaneThread {
    build: Build,
    tell: Arc<dyn Fn(Event) + Send + Sync>,
}

impl LaneThread {
    fn work(&self, inbox: &mpsc::Receiver<Job>) {
        let mut resources = match self.build() {
            Ok(resources) => resources,
            Err(error) => return (self.tell)(Event::Unusable(error)),
        };
        (self.tell)(Event::Ready);
        while let Ok(job) = inbox.recv() {
            let (done, sound) = self.perform(job, &mut resources);
            if sound {
                (self.tell)(Event::Done(Box::new(done)));
                continue;
            }
            // What a panic left half done is not used again, and may panic once more while it is dropped.
            let fresh = self.build();
            (self.tell)(Event::Done(Box::new(done)));
            match fresh {
                Ok(fresh) => {
                    let broken = std::mem::replace(&mut resources, fresh);
                    drop(catch_unwind(AssertUnwindSafe(move || drop(broken))));
                }
                Err(error) => return (self.tell)(Event::Unusable(error)),
            }
        }
    }

    fn build(&self) -> Result<(Instructors, Managers)> {
        catch_unwind(AssertUnwindSafe(|| (self.build)())).unwrap_or_else(|panic| Err(bug(panic.as_ref())))
    }

    /// The job's end, and whether the managers can still be trusted.
    fn perform(&self, job: Job, (instructors, managers): &mut (Instructors, Managers)) -> (Done, bool) {
        // Where downloads are on, it may turn out that one must go before.
        let kept = (managers.model().catalog.hub.download && job.call.has_fetched()).then(|| job.clone());
        let Job { request_id, call, cancel, deadline, preview } = job;
        let tell = Arc::clone(&self.tell);
        let id = request_id.clone();
        let sink = Box::new(move |progress| tell(Event::Progress { request_id: id.clone(), progress }));
        let ctx = Context::new(request_id.clone(), cancel, deadline, preview, sink);
        let work = AssertUnwindSafe(|| {
            ctx.checkpoint()?;
            // Making images climbs a ladder of its own.
            let again = (!matches!(call, Call::Inference(_))).then(|| call.clone());
            match (instructors.dispatch(call, managers, &ctx), again) {
                // What is kept for later may be what is missing now.
                (Err(Error::OutOfMemory { stage, needed, .. }), Some(again)) => {
                    let freed = managers.free_memory(Bytes(u64::MAX), Reach::Idle);
                    tracing::warn!(request_id, stage, %needed, %freed, "out of memory; tried again with empty shelves");
                    ctx.warn(format!(
                        "memory ran out in {stage}; everything kept was let go, and the work begun again"
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
