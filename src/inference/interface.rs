//! What can be asked of the inference domain.

use serde::{Deserialize, Serialize};

/// The section `workers.instructors.inference` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Images of a request that names no `batch_size`.
    pub batch_size: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { batch_size: 1 }
    }
}
