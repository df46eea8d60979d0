//! The inference domain's operations, and its section of the configuration.

use serde::{Deserialize, Serialize};

pub use crate::inference::request::generate::{BatchRequest, GenerateRequest, RefinerOptions, VaeSample};
pub use crate::inference::request::memory::DecodeExtent;
use crate::inference::request::memory::Offload;
pub use crate::inference::request::result::{CacheUse, Estimate, Generated, GeneratedBatch, Image};
use crate::layers::{Domain, Interface};

/// The section `workers.instructors.inference` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Default `batch_size` of a request.
    pub batch_size: u32,
    /// Largest width or height in pixels.
    pub max_side: u32,
    /// Largest number of images in one request.
    pub max_batch_size: u32,
    /// Default `decode` of a request: `auto`, `whole` or `strips`.
    pub decode: DecodeExtent,
    /// Default `slice` of a request: true evaluates guidance one pass after another, `null` does so if memory is short.
    pub slice: Option<bool>,
    /// Default `offload` of a request: `auto`, `none`, `text_encoders` or `sequential`.
    pub offload: Offload,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            batch_size: 1,
            max_side: 4096,
            max_batch_size: 64,
            decode: DecodeExtent::Auto,
            slice: None,
            offload: Offload::Auto,
        }
    }
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Generate(Box<GenerateRequest>),
    Text2image(Box<GenerateRequest>),
    Img2img(Box<GenerateRequest>),
    Inpaint(Box<GenerateRequest>),
    /// As `generate`, with at least one ControlNet.
    Controlnet(Box<GenerateRequest>),
    /// As `generate`, with at least one LoRA.
    Lora(Box<GenerateRequest>),
    Batch(BatchRequest),
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    Generated(Generated),
    Batch(GeneratedBatch),
    Estimate(Estimate),
}

pub struct Inference;

impl Interface for Inference {
    const DOMAIN: Domain = Domain::Inference;
    const OPERATIONS: &'static [&'static str] =
        &["generate", "text2image", "img2img", "inpaint", "controlnet", "lora", "batch"];
    type Request = Request;
    type Response = Response;
}
