//! What can be asked of the model domain.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};
use crate::units::Bytes;

/// The section `workers.instructors.model` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Bytes of weights that are kept in memory, as a number or as `4GB`.
    pub cache_size: Bytes,
    /// Folders beneath which models are looked for.
    pub roots: Vec<PathBuf>,
    /// Model of requests that name none; the demonstration model when it is left out.
    pub default: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache_size: Bytes(1024 * 1_000_000), roots: vec![PathBuf::from("models")], default: None }
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

pub struct Model;

impl Interface for Model {
    const DOMAIN: Domain = Domain::Model;
    const OPERATIONS: &'static [&'static str] = &["list"];
    type Request = Request;
    type Response = Response;
}
