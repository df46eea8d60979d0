//! What can be asked of the postprocessing domain.

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};

/// The section `workers.instructors.postprocessing` of the configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {}

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

pub struct Postprocessing;

impl Interface for Postprocessing {
    const DOMAIN: Domain = Domain::Postprocessing;
    const OPERATIONS: &'static [&'static str] = &["list"];
    type Request = Request;
    type Response = Response;
}

/// Where the image goes, and in which format.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct OutputWish {}
