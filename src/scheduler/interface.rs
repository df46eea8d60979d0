//! What can be asked of the scheduler domain.

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};

/// The section `workers.instructors.scheduler` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Sampler of requests that name none; `auto` takes the checkpoint's own.
    pub default_scheduler: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { default_scheduler: "ddim".to_owned() }
    }
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    List(Nothing),
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    Nothing(Nothing),
}

pub struct Scheduler;

impl Interface for Scheduler {
    const DOMAIN: Domain = Domain::Scheduler;
    const OPERATIONS: &'static [&'static str] = &["list"];
    type Request = Request;
    type Response = Response;
}
