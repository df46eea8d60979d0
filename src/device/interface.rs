//! What can be asked of the devices.

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};

/// Number format of activations and arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    #[must_use]
    pub fn tensor(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
            Self::F16 => candle_core::DType::F16,
        }
    }
}

/// The section `workers.instructors.device` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Take the best device that works. `false`: the CPU, unless `device` names another.
    pub auto_detect: bool,
    /// `cpu`, `cuda`, `cuda:1`, `metal` or `auto`; over `auto_detect` when it is there.
    pub device: Option<String>,
    /// Compute dtype; the device's own choice when it is left out.
    pub dtype: Option<Dtype>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { auto_detect: true, device: None, dtype: None }
    }
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    List(Nothing),
    Info(Nothing),
    Memory(Nothing),
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    Nothing(Nothing),
}

pub struct Device;

impl Interface for Device {
    const DOMAIN: Domain = Domain::Device;
    const OPERATIONS: &'static [&'static str] = &["list", "info", "memory"];
    type Request = Request;
    type Response = Response;
}
