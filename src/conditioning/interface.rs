//! What can be asked of the conditioning domain.

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};

/// The section `workers.instructors.conditioning` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether the embeddings of prompts are kept for the next request.
    pub cache_embeddings: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache_embeddings: true }
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

pub struct Conditioning;

impl Interface for Conditioning {
    const DOMAIN: Domain = Domain::Conditioning;
    const OPERATIONS: &'static [&'static str] = &["list"];
    type Request = Request;
    type Response = Response;
}
