//! The lines of stdout: result, error and event.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::communication::interface::Communication;
use crate::conditioning::interface::Conditioning;
use crate::context;
use crate::device::interface::Device;
use crate::error::Error;
use crate::inference::interface::Inference;
use crate::layers::Interface;
use crate::model::interface::Model;
use crate::postprocessing::interface::Postprocessing;
use crate::scheduler::interface::Scheduler;
use crate::units::Bytes;

/// The value of `type`, one per kind of line.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResultTag {
    Result,
}

#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorTag {
    Error,
}

#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventTag {
    Event,
}

/// `data` of a result: the response of one of the domains.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum AnyData {
    Communication(<Communication as Interface>::Response),
    Device(<Device as Interface>::Response),
    Scheduler(<Scheduler as Interface>::Response),
    Model(<Model as Interface>::Response),
    Conditioning(<Conditioning as Interface>::Response),
    Postprocessing(<Postprocessing as Interface>::Response),
    Inference(<Inference as Interface>::Response),
}

/// The terminal line of a request that succeeded.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ResultLine<'a> {
    pub r#type: ResultTag,
    pub request_id: &'a str,
    /// Always true.
    pub success: bool,
    #[schemars(with = "AnyData")]
    pub data: &'a RawValue,
    pub warnings: &'a [Warning],
    pub timings_ms: &'a Timings,
    pub engine: &'a EngineReport,
}

/// Something that the client should know although the request succeeds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Warning {
    pub message: String,
    /// JSON pointer into the request line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pointer: Option<String>,
}

/// Milliseconds by stage.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Timings {
    /// From acceptance to the start.
    pub queue: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encode: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denoise: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<u64>,
    /// From acceptance to this line.
    pub total: u64,
}

impl Timings {
    pub fn add(&mut self, stage: context::Stage, ms: u64) {
        let slot = match stage {
            context::Stage::Load => &mut self.load,
            context::Stage::Encode => &mut self.encode,
            context::Stage::Denoise => &mut self.denoise,
            context::Stage::Decode => &mut self.decode,
            context::Stage::Write => &mut self.write,
        };
        *slot = Some(slot.unwrap_or(0) + ms);
    }
}

/// The engine that computed the result. `device`, `dtype` and `quantization` are present if tensors were used.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EngineReport {
    pub version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<&'static str>,
    /// `none`, `int8`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<&'static str>,
}

impl EngineReport {
    /// The engine of a request, `None` if it used no tensors.
    #[must_use]
    pub fn new(engine: Option<context::Engine>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            device: engine.as_ref().map(|engine| engine.device.clone()),
            dtype: engine.as_ref().map(|engine| engine.dtype),
            quantization: engine.map(|engine| engine.quantization),
        }
    }
}

/// The terminal line of a request that failed.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ErrorLine<'a> {
    pub r#type: ErrorTag,
    pub request_id: &'a str,
    /// Always false.
    pub success: bool,
    pub error: &'a ErrorBody,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorScope {
    /// This request is the reason.
    Request,
    /// The state of the worker is the reason; another request would fail too.
    Worker,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ErrorBody {
    #[schemars(extend("enum" = Error::CODES))]
    pub code: &'static str,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// JSON pointer into the request line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pointer: Option<String>,
    /// True if the same request may succeed later.
    pub retryable: bool,
    pub scope: ErrorScope,
    /// With `out_of_memory`: the stage of the work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<&'static str>,
    /// With `out_of_memory`: bytes needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needed: Option<Bytes>,
    /// With `out_of_memory`: bytes free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<Bytes>,
    /// With `out_of_memory`: what would fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<String>,
    /// With `internal`: the id of the error in the log on stderr.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bug_id: Option<String>,
}

/// Longest message, hint and pointer, in characters: an answer must not grow with the line that caused it.
const MAX_TEXT: usize = 600;

impl From<&Error> for ErrorBody {
    fn from(error: &Error) -> Self {
        let scope = match error {
            Error::QueueFull { .. }
            | Error::Draining
            | Error::DeviceLost { .. }
            | Error::DeviceUnavailable { .. }
            | Error::OutOfMemory { .. } => ErrorScope::Worker,
            _ => ErrorScope::Request,
        };
        let mut body = Self {
            code: error.code(),
            message: clip(error.to_string(), MAX_TEXT),
            hint: error.hint().map(|hint| clip(hint, MAX_TEXT)),
            pointer: error.pointer().filter(|pointer| pointer.chars().count() <= MAX_TEXT),
            retryable: error.retryable(),
            scope,
            stage: None,
            needed: None,
            free: None,
            fits: None,
            bug_id: None,
        };
        if let Error::OutOfMemory { stage, needed, free, fits } = error {
            body.stage = Some(stage);
            body.needed = Some(needed.unwrap_or_default());
            body.free = Some(free.unwrap_or_default());
            body.fits.clone_from(fits);
        }
        body
    }
}

/// Cuts `text` to `limit` characters and notes how many it had.
#[must_use]
pub fn clip(mut text: String, limit: usize) -> String {
    if let Some((cut, _)) = text.char_indices().nth(limit) {
        let all = text.chars().count();
        text.truncate(cut);
        // Writing to a `String` cannot fail.
        let _ = write!(text, "… ({all} characters)");
    }
    text
}

/// A line about a request in flight or about the worker; never terminal.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct EventLine<'a> {
    pub r#type: EventTag,
    /// Absent in `ready` and `heartbeat`, which belong to no request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
    /// Counts the events of a request, from 0.
    pub seq: u64,
    #[serde(flatten)]
    pub event: &'a Event,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The request is accepted; `position` requests go before it.
    Accepted {
        position: usize,
    },
    Started,
    /// A stage of the work begins.
    Stage {
        stage: &'static str,
    },
    ModelLoading {
        component: &'static str,
        bytes_done: Bytes,
        bytes_total: Bytes,
    },
    /// A file of a repository is being downloaded; bytes count all its files.
    Fetching {
        file: String,
        bytes_done: Bytes,
        bytes_total: Bytes,
    },
    Progress {
        stage: &'static str,
        done: usize,
        total: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        it_per_s: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        eta_ms: Option<u64>,
    },
    /// A preview of the image after `step` steps: the bytes of a PNG.
    Preview {
        step: usize,
        base64: String,
    },
    Image {
        index: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        path: Option<String>,
        seed: u64,
    },
    Warning {
        message: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        pointer: Option<String>,
    },
    /// Events of this request dropped because stdout was not read fast enough.
    Dropped {
        count: u64,
    },
    Heartbeat {
        uptime_ms: u64,
        queue_depth: usize,
        running: usize,
    },
    Ready {
        version: &'static str,
        protocol: &'static str,
        pid: u32,
    },
}

impl Event {
    /// Every name of `event`.
    pub const NAMES: &'static [&'static str] = &[
        "accepted",
        "started",
        "stage",
        "model_loading",
        "fetching",
        "progress",
        "preview",
        "image",
        "warning",
        "dropped",
        "heartbeat",
        "ready",
    ];
}

impl Warning {
    #[must_use]
    pub fn new(message: String, pointer: Option<String>) -> Self {
        Self { message: clip(message, MAX_TEXT), pointer: pointer.filter(|pointer| pointer.len() <= MAX_TEXT) }
    }
}
