//! The four layers as traits. Each has a generic caller: the codec, the dispatcher, `make_room`, `Context::perform`.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::error::Result;
use crate::units::Bytes;

/// The seven domains; `worker_type` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    Communication,
    Device,
    Scheduler,
    Model,
    Conditioning,
    Postprocessing,
    Inference,
}

impl Domain {
    pub const ALL: [Self; 7] = [
        Self::Communication,
        Self::Device,
        Self::Scheduler,
        Self::Model,
        Self::Conditioning,
        Self::Postprocessing,
        Self::Inference,
    ];

    /// The name of the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Communication => "communication",
            Self::Device => "device",
            Self::Scheduler => "scheduler",
            Self::Model => "model",
            Self::Conditioning => "conditioning",
            Self::Postprocessing => "postprocessing",
            Self::Inference => "inference",
        }
    }

    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|domain| domain.name() == name)
    }
}

/// What can be asked of a domain: its wire vocabulary.
///
/// `Request` is an enum with one newtype variant per operation, named as the operation in snake case, so that the
/// codec can deserialize it from the operation's name and the line's `data`.
pub trait Interface {
    const DOMAIN: Domain;
    /// Operations this worker performs. What the protocol names beyond these is `unsupported_feature`.
    const OPERATIONS: &'static [&'static str];
    type Request: DeserializeOwned + Send + 'static;
    type Response: Serialize + Send + 'static;
}

/// The `data` of an operation that takes none.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Nothing {}

pub type RequestOf<I> = <<I as Instructor>::Interface as Interface>::Request;
pub type ResponseOf<I> = <<I as Instructor>::Interface as Interface>::Response;

/// Decides what shall be done: defaults, validation, order of work.
pub trait Instructor {
    type Interface: Interface;
    /// What the instructor may draw on.
    type Crew;

    /// # Errors
    /// Whatever the request's own fault or the work's failure is, with a stable code.
    fn instruct(&self, request: RequestOf<Self>, crew: &mut Self::Crew, ctx: &Context) -> Result<ResponseOf<Self>>;
}

/// One thing that a manager keeps in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Resident {
    /// The manager that keeps it: `unet`, `vae`, `encoder`, …
    pub kind: &'static str,
    /// What it is, for people: the model's name and part.
    pub name: String,
    pub bytes: Bytes,
    pub pinned: bool,
}

/// Keeps one kind of long-lived resource, and counts its bytes.
pub trait Manager {
    fn resident(&self) -> Vec<Resident>;

    /// Frees at least `want` if it can, least recently used first, and says how much it freed.
    fn evict(&mut self, want: Bytes) -> Bytes;
}

/// One algorithm, stateless between calls.
pub trait Worker<Task>: Send + Sync {
    type Output;

    /// # Errors
    /// The work's failure, with a stable code.
    fn run(&self, task: Task, ctx: &Context) -> Result<Self::Output>;
}
