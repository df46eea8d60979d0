//! The vocabulary of the wire: the head of a request line, control operations, and every line that goes out.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::inference::interface::GenerateRequest;
use crate::layers::{Domain, Interface, Nothing, Resident};
use crate::runtime::config::{LogLevel, OnEof};

/// Version of the protocol. Additions raise the minor number.
pub const PROTOCOL: &str = "1.3";
/// Longest `request_id` and `idempotency_key`, in characters.
pub const MAX_ID_CHARS: usize = 256;
/// Deepest nesting of arrays and objects in a line.
pub const MAX_DEPTH: usize = 64;
/// `priority` lies in -100..=100.
pub const MAX_PRIORITY: i64 = 100;
/// Longest `timeout_ms`: a week.
pub const MAX_TIMEOUT_MS: i64 = 7 * 24 * 60 * 60 * 1000;

/// Every operation that the protocol names, whether this worker performs it or not.
pub const TABLE: &[(Domain, &[&str])] = &[
    (Domain::Inference, &["generate", "text2image", "img2img", "inpaint", "controlnet", "lora", "batch"]),
    (Domain::Model, &["list", "inspect", "load", "unload", "pin", "fetch"]),
    (Domain::Conditioning, &["encode_prompt", "tokenize", "preprocess", "list"]),
    (Domain::Scheduler, &["list", "describe"]),
    (Domain::Postprocessing, &["upscale", "enhance", "check_safety", "metadata", "list"]),
    (Domain::Device, &["list", "info", "memory"]),
    (Domain::Communication, Communication::OPERATIONS),
];

/// What a request line says beside its `data`.
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
    /// The fields of `data` stood at the top of the line.
    pub shorthand: bool,
}

/// The keys of a head, for the schema and for "did you mean".
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HeadKeys {
    /// 1 to 256 characters, no control characters. Default: `auto-<n>`, n counting the lines of input.
    #[schemars(length(min = 1, max = 256))]
    pub request_id: Option<String>,
    /// The domain that is asked.
    pub worker_type: Option<String>,
    pub operation: Option<String>,
    /// Higher goes first, -100 to 100. Default: 0.
    #[schemars(range(min = -100, max = 100))]
    pub priority: Option<i64>,
    /// Milliseconds from acceptance, 1 to 604800000, after which the request ends with `deadline_exceeded`.
    #[schemars(range(min = 1, max = 604_800_000_u64))]
    pub timeout_ms: Option<u64>,
    /// The same key again within this process gets the same answer. 1 to 256 characters.
    #[schemars(length(min = 1, max = 256))]
    pub idempotency_key: Option<String>,
    /// Events wanted. Default: none.
    pub events: Option<EventOptions>,
    /// `false` turns an unknown key into a warning. Default: true.
    pub strict: Option<bool>,
}

/// Which events a request wants. An empty object asks for all but `progress` and `preview`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct EventOptions {
    /// Emit `progress`. Default: false.
    pub progress: bool,
    /// Emit `preview`. Default: none.
    pub preview: Option<PreviewKeys>,
}

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
    /// `data` as of `generate`.
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
    /// `finish` what was accepted, or `cancel` it. Default: `finish`.
    #[serde(default)]
    pub mode: Option<OnEof>,
}

/// What is logged; asked and answered in the same form.
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
    Drain(Ending),
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
    /// Instruction sets of the CPU's kernels: `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`.
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
    /// Kinds of device that are compiled in.
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
pub enum Compute {
    Starting,
    Idle,
    Busy,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Health {
    /// Answering at all is being alive; this says whether new work would be taken.
    pub accepting: bool,
    pub compute: Compute,
    pub uptime_ms: u64,
    /// Milliseconds since the compute thread last said something, while it is busy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silent_ms: Option<u64>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Metrics {
    /// Non-blank lines of input.
    pub lines: u64,
    /// Requests that were queued or begun.
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
    /// Of late; left out before the first step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_per_step: Option<f64>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Status {
    pub draining: bool,
    /// In the order in which they would run now.
    pub queue: Vec<Waiting>,
    pub running: Vec<Running>,
    /// What the compute thread keeps in memory.
    pub residents: Vec<Resident>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Waiting {
    pub request_id: String,
    pub worker_type: &'static str,
    pub operation: String,
    pub priority: i64,
    pub waited_ms: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Running {
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
pub enum Found {
    Queued,
    Running,
    Finished,
    Unknown,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Cancelled {
    pub found: Found,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CancelledAll {
    pub queued: usize,
    pub running: usize,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Ending {
    /// No new work is taken from here on.
    pub draining: bool,
    /// Requests that are still to be answered.
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
