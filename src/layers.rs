//! The four layers as traits. Each has a generic caller: the codec, `dispatch::run`, `Managers::free_memory` and
//! `Context::perform`.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::error::Result;
use crate::units::{Bytes, Dtype, Quantization};

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

    /// The name on the wire.
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

/// The wire vocabulary of a domain.
///
/// `Request` is an enum with one newtype variant per operation, which has the operation's name in snake case, so that
/// the codec can deserialize it from the operation's name and the line's `data`.
pub trait Interface {
    const DOMAIN: Domain;
    /// Operations that this worker performs. The protocol's other operations are answered `unsupported_feature`.
    const OPERATIONS: &'static [&'static str];
    type Request: DeserializeOwned + Send + 'static;
    type Response: Serialize + Send + 'static;
}

/// The `data` of an operation without fields.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Nothing {}

/// A list; on the wire, a single element may stand for a list of one.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Elements<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array, or one element of it")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> std::result::Result<OneOrMany<T>, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<OneOrMany<T>, A::Error> {
                Ok(OneOrMany(vec![T::deserialize(MapAccessDeserializer::new(map))?]))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<OneOrMany<T>, E> {
                Ok(OneOrMany(vec![T::deserialize(text.into_deserializer())?]))
            }
        }

        deserializer.deserialize_any(Elements(PhantomData))
    }
}

impl<T: schemars::JsonSchema> schemars::JsonSchema for OneOrMany<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("OneOrMany_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let one = generator.subschema_for::<T>();
        schemars::json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}

pub type RequestOf<I> = <<I as Instructor>::Interface as Interface>::Request;
pub type ResponseOf<I> = <<I as Instructor>::Interface as Interface>::Response;

/// Decides what is done: defaults, validation, order of work.
pub trait Instructor {
    type Interface: Interface;
    /// The managers that the instructor works with; `()` if it needs none.
    type Resources<'a>;

    /// Carries out a request.
    ///
    /// # Errors
    /// The request's fault or the work's failure, with a stable code.
    fn instruct(
        &self,
        request: RequestOf<Self>,
        resources: Self::Resources<'_>,
        ctx: &Context,
    ) -> Result<ResponseOf<Self>>;
}

/// A resource that a manager keeps in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Resident {
    /// Kind of the resource: `unet`, `vae`, `encoder`, …
    pub kind: &'static str,
    /// Name for people: the model's name and part.
    pub name: String,
    pub bytes: Bytes,
    pub pinned: bool,
    /// Time of its last use in milliseconds of Unix time; `null` if that is not recorded.
    pub used_ms: Option<u64>,
    /// Number formats and location of a network's weights; `None` for everything else.
    #[serde(skip)]
    pub form: Option<ResidentForm>,
    /// Key of the adapters or files that change it.
    #[serde(skip)]
    pub over: Option<u64>,
}

/// Number formats of a network's weights, and where they stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidentForm {
    /// The dtype in which the network computes.
    pub dtype: Dtype,
    pub quantization: Quantization,
    /// True if weights stay on the host, and are brought to the device a layer at a time.
    pub offloaded: bool,
}

/// Keeps one kind of long-lived resource and counts its bytes. Every manager can evict everything that it lists and that
/// is neither pinned nor in use.
pub trait Manager {
    /// Everything that is kept in memory.
    fn resident(&self) -> Vec<Resident>;

    /// Frees at least `want` if possible, least recently used first, and returns the bytes freed.
    fn evict(&mut self, want: Bytes) -> Bytes;
}

/// One algorithm, stateless between calls.
pub trait Worker<Task>: Send + Sync {
    type Output;

    /// Runs the algorithm on one task.
    ///
    /// # Errors
    /// The work's failure, with a stable code.
    fn run(&self, task: Task, ctx: &Context) -> Result<Self::Output>;
}

impl Context {
    /// Runs a worker after a checkpoint, in a tracing span. This is the only way to run one.
    ///
    /// # Errors
    /// Those of [`Self::checkpoint`] and of the worker.
    pub fn perform<Task, W: Worker<Task> + ?Sized>(&self, worker: &W, task: Task) -> Result<W::Output> {
        self.checkpoint()?;
        let span = tracing::debug_span!("perform", worker = std::any::type_name::<W>());
        span.in_scope(|| worker.run(task, self))
    }
}
