//! Settings, requests and responses of the scheduler domain.

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};
use crate::scheduler::config::Prediction;

/// The section `workers.instructors.scheduler` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Default sampler; `auto` takes the checkpoint's own. Default `ddim`.
    pub default_scheduler: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { default_scheduler: "ddim".to_owned() }
    }
}

/// Sampling options of a request. [`crate::scheduler::instructor::SchedulerInstructor`] decides whatever is left out.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SamplingOptions {
    /// The sampler: a name of `scheduler.list`, AUTOMATIC1111's or diffusers' ("DPM++ 2M Karras",
    /// `EulerDiscreteScheduler`). A schedule at the end of the name counts as `scheduler`. Default: the configured one.
    #[serde(default)]
    pub sampler_name: Option<String>,
    /// The schedule: a name of `scheduler.list` or AUTOMATIC1111's. Default: the checkpoint's, or `leading`.
    #[serde(default)]
    pub scheduler: Option<String>,
    /// Number of steps, 1 to 1000. Default 25, or the number of `sigmas` or `timesteps`.
    #[serde(default, alias = "num_inference_steps")]
    pub steps: Option<i64>,
    /// Share of fresh noise, 0 to 1, for samplers with η. Default 0 for `ddim`, 0.3 for `tcd`, 1 for others.
    #[serde(default)]
    pub eta: Option<f64>,
    /// Noise levels of the run instead of a schedule, falling; a final 0 is added if missing.
    #[serde(default)]
    pub sigmas: Option<Vec<f64>>,
    /// Timesteps of the run instead of a schedule, falling, 0 to 999.
    #[serde(default)]
    pub timesteps: Option<Vec<f64>>,
    /// The quantity that the network predicts. Default: the checkpoint's.
    #[serde(default)]
    pub prediction_type: Option<Prediction>,
    /// Rescale the noise schedule so that the last timestep has no signal left. Default: the checkpoint's.
    #[serde(default)]
    pub zero_terminal_snr: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The samplers and schedules of this worker.
    List(Nothing),
    /// The plan for these options with the noise schedule of SDXL base.
    Describe(SamplingOptions),
}

/// A sampler or a schedule.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Listed {
    pub name: &'static str,
    /// The name in AUTOMATIC1111, if it has one.
    pub label: &'static str,
    pub aliases: &'static [&'static str],
    pub about: &'static str,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Listing {
    pub samplers: Vec<Listed>,
    pub schedules: Vec<Listed>,
}

/// A sampling plan.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Description {
    pub sampler_name: &'static str,
    /// The schedule, or `sigmas` or `timesteps` for a request with its own.
    pub scheduler: &'static str,
    pub steps: usize,
    /// Number of network evaluations, not counting guidance.
    pub evaluations: usize,
    pub eta: f64,
    pub prediction_type: Prediction,
    pub zero_terminal_snr: bool,
    /// Sampling starts from unit noise times this factor.
    pub init_scale: f64,
    /// σ at the start of each step, and then at the end of the last.
    pub sigmas: Vec<f64>,
    /// The network's time input at the start of each step.
    pub timesteps: Vec<f64>,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    List(Listing),
    Describe(Description),
}

pub struct Scheduler;

impl Interface for Scheduler {
    const DOMAIN: Domain = Domain::Scheduler;
    const OPERATIONS: &'static [&'static str] = &["list", "describe"];
    type Request = Request;
    type Response = Response;
}
