//! The vocabulary of the wire: the head of a request line, and the requests and responses of control operations.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::conditioning::interface::Conditioning;
use crate::device::interface::Device;
use crate::inference::interface::{GenerateRequest, Inference};
use crate::layers::{Domain, Interface, Nothing, Resident};
use crate::model::interface::Model;
use crate::postprocessing::interface::Postprocessing;
use crate::runtime::config::{LogLevel, OnEof};
use crate::scheduler::interface::Scheduler;

/// Version of the protocol. Additions raise the minor number.
pub const PROTOCOL: &str = "1.4";
/// Longest `request_id` and `idempotency_key`, in characters.
pub const MAX_ID_CHARS: usize = 256;
/// Deepest nesting of arrays and objects in a line.
pub const MAX_DEPTH: usize = 64;
/// `priority` lies in -100..=100.
pub const MAX_PRIORITY: i64 = 100;
/// Longest `timeout_ms`: a week.
pub const MAX_TIMEOUT_MS: i64 = 7 * 24 * 60 * 60 * 1000;

/// Operations that the protocol names and this worker does not perform.
pub const NOT_PERFORMED: &[(Domain, &str)] = &[
    (Domain::Postprocessing, "upscale"),
    (Domain::Postprocessing, "enhance"),
    (Domain::Postprocessing, "check_safety"),
];

/// Every operation that the protocol names: those that this worker performs, and [`NOT_PERFORMED`].
pub fn operations() -> impl Iterator<Item = (Domain, &'static str)> {
    fn of<I: Interface>() -> impl Iterator<Item = (Domain, &'static str)> {
        I::OPERATIONS.iter().map(|operation| (I::DOMAIN, *operation))
    }
    of::<Inference>()
        .chain(of::<Model>())
        .chain(of::<Conditioning>())
        .chain(of::<Scheduler>())
        .chain(of::<Postprocessing>())
        .chain(of::<Device>())
        .chain(of::<Communication>())
        .chain(NOT_PERFORMED.iter().copied())
}

/// A request line without its `data`.
#[derive(Clone, Debug)]
pub struct Head {
    pub request_id: String,
    pub worker_type: Domain,
    pub operation: String,
    pub priority: i64,
    pub timeout_ms: Option<u64>,
    pub idempotency_key: Option<String>,
    pub events: Option<EventOptions>,
    pub strict: bool,
    /// True if the line had the fields of `data` at its top.
    pub shorthand: bool,
}

/// The keys of a head, for the schema.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HeadKeys {
    /// 1 to 256 characters, no control characters. Default: `auto-<n>`, where n is the number of the input line.
    #[schemars(length(min = 1, max = 256))]
    pub request_id: Option<String>,
    /// The domain that carries out the request.
    pub worker_type: Option<String>,
    /// The domain's operation.
    pub operation: Option<String>,
    /// Higher goes first, -100 to 100. Default: 0.
    #[schemars(range(min = -100, max = 100))]
    pub priority: Option<i64>,
    /// Milliseconds from acceptance, 1 to 604800000, after which the request ends with `deadline_exceeded`.
    #[schemars(range(min = 1, max = 604_800_000_u64))]
    pub timeout_ms: Option<u64>,
    /// A later request with the same key gets the same answer, within this process. 1 to 256 characters.
    #[schemars(length(min = 1, max = 256))]
    pub idempotency_key: Option<String>,
    /// Events to emit. Default: none.
    pub events: Option<EventOptions>,
    /// `false` turns an unknown key into a warning. Default: true.
    pub strict: Option<bool>,
}

/// The events of a request. An empty object enables all but `progress` and `preview`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct EventOptions {
    /// Emit `progress`. Default: false.
    pub progress: bool,
    /// Emit `preview`. Default: none.
    pub preview: Option<PreviewKeys>,
}

/// The previews of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct PreviewKeys {
    /// Steps between previews, 1 to 1000. Default: 5.
    #[schemars(range(min = 1, max = 1000))]
    pub every: u32,
    /// Longest side in pixels, 16 to 2048. Default: 256.
    #[schemars(range(min = 16, max = 2048))]
    pub max_side: u32,
}

impl Default for PreviewKeys {
    fn default() -> Self {
        Self { every: 5, max_side: 256 }
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Hello(Nothing),
    Capabilities(Nothing),
    Schema(Nothing),
    Health(Nothing),
    Metrics(Nothing),
    Status(Nothing),
    /// `data` is that of `generate`.
    Estimate(Box<GenerateRequest>),
    Cancel(CancelRequest),
    CancelAll(Nothing),
    Drain(Nothing),
    Shutdown(ShutdownRequest),
    Ping(Nothing),
    SetLogLevel(LogLevelRequest),
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CancelRequest {
    /// The request to cancel.
    pub request_id: String,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// `finish` or `cancel` accepted requests. Default: `finish`.
    #[serde(default)]
    pub mode: Option<OnEof>,
}

/// The log level; request and response have the same form.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct LogLevelRequest {
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`.
    pub level: LogLevel,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Response {
    Hello(Hello),
    Capabilities(Box<Capabilities>),
    /// The JSON Schema of the wire.
    Schema(#[schemars(with = "BTreeMap<String, serde_json::Value>")] Box<RawValue>),
    Health(Health),
    Metrics(Metrics),
    Status(Status),
    Cancel(Cancelled),
    CancelAll(CancelledAll),
    Drain(Draining),
    Ping(Pong),
    SetLogLevel(LogLevelRequest),
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Hello {
    pub name: &'static str,
    pub version: &'static str,
    pub protocol: &'static str,
    pub pid: u32,
    pub uptime_ms: u64,
    /// Instruction sets that the CPU kernels use: `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`.
    pub cpu_features: &'static str,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Capabilities {
    pub version: &'static str,
    pub protocol: &'static str,
    /// By `worker_type`.
    pub operations: BTreeMap<&'static str, Vec<&'static str>>,
    pub samplers: Vec<&'static str>,
    pub schedules: Vec<&'static str>,
    pub formats: Vec<&'static str>,
    /// Kinds of device in this build.
    pub devices: Vec<&'static str>,
    pub dtypes: Vec<&'static str>,
    pub quantizations: Vec<&'static str>,
    pub events: Vec<&'static str>,
    pub error_codes: Vec<&'static str>,
    pub limits: Limits,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Limits {
    pub max_line_bytes: usize,
    pub queue_limit: usize,
    pub max_depth: usize,
    pub max_id_chars: usize,
    pub max_priority: i64,
    pub max_timeout_ms: i64,
    pub max_steps: u32,
    pub max_side: u32,
    pub max_batch_size: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ComputeState {
    Starting,
    Idle,
    Busy,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Health {
    /// True if new work would be accepted.
    pub accepting: bool,
    pub compute: ComputeState,
    pub uptime_ms: u64,
    /// Milliseconds since the last event of the compute thread, while it is busy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silent_ms: Option<u64>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Metrics {
    /// Non-blank lines of input.
    pub lines: u64,
    /// Requests that were queued or started.
    pub accepted: u64,
    /// Result lines.
    pub finished: u64,
    /// Error lines by code.
    pub failed: BTreeMap<&'static str, u64>,
    pub images: u64,
    pub queue_depth: usize,
    pub running: usize,
    pub dropped_events: u64,
    pub uptime_ms: u64,
    /// Moving average; absent before the first step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_per_step: Option<f64>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Status {
    pub draining: bool,
    /// In the order in which they would run now.
    pub queue: Vec<QueuedRequest>,
    pub running: Vec<RunningRequest>,
    /// Everything that the compute thread keeps in memory.
    pub residents: Vec<Resident>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct QueuedRequest {
    pub request_id: String,
    pub worker_type: &'static str,
    pub operation: String,
    pub priority: i64,
    pub waited_ms: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RunningRequest {
    pub request_id: String,
    pub worker_type: &'static str,
    pub operation: String,
    pub running_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<&'static str>,
    pub done: usize,
    pub total: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CancelOutcome {
    Queued,
    Running,
    Finished,
    Unknown,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Cancelled {
    pub found: CancelOutcome,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CancelledAll {
    pub queued: usize,
    pub running: usize,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Draining {
    /// New work is refused from now on.
    pub draining: bool,
    /// Requests that still have to be answered.
    pub in_flight: usize,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Pong {
    pub pong: bool,
}

pub struct Communication;

impl Interface for Communication {
    const DOMAIN: Domain = Domain::Communication;
    const OPERATIONS: &'static [&'static str] = &[
        "hello",
        "capabilities",
        "schema",
        "health",
        "metrics",
        "status",
        "estimate",
        "cancel",
        "cancel_all",
        "drain",
        "shutdown",
        "ping",
        "set_log_level",
    ];
    type Request = Request;
    type Response = Response;
}
