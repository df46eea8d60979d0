//! Results of the inference domain's operations.

use serde::Serialize;

use crate::conditioning::interface::{AppliedEmbedding, CacheCount};
use crate::inference::request::generate::GenerateRequest;
use crate::inference::request::lora::AppliedAdapter;
use crate::inference::request::memory::{Largest, MemoryStrategy, MemoryUse, PartBytes};
use crate::units::Bytes;

/// One finished image.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Image {
    /// The file that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The file's bytes, if the request asks for them in place of a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    pub format: &'static str,
    pub seed: u64,
    /// The variation's seed, if the image has a variation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subseed: Option<u64>,
    pub width: usize,
    pub height: usize,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Generated {
    pub images: Vec<Image>,
    /// The model's name.
    pub model: String,
    /// Every value used. Sent back as `data`, it makes the same image.
    pub parameters: Box<GenerateRequest>,
    /// The textual inversions that the prompts used.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<AppliedEmbedding>,
    /// Results of earlier requests that were reused.
    pub cache: CacheUse,
    /// Memory choices in effect, and the fallbacks that were taken.
    pub memory: MemoryUse,
    /// Each adapter's file and how much of it was applied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AppliedAdapter>,
}

/// Cache hits and misses of a request.
#[derive(Clone, Copy, Debug, Default, Serialize, schemars::JsonSchema)]
pub struct CacheUse {
    /// Texts of the prompts.
    pub embeddings: CacheCount,
    /// Hints of ControlNets.
    pub hints: CacheCount,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct GeneratedBatch {
    /// In the order of `requests`.
    pub results: Vec<Generated>,
}

/// Memory and time that a generation needs.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Estimate {
    /// Bytes of all weights as they will be held.
    pub weights: Bytes,
    /// The same by network.
    pub parts: Vec<PartBytes>,
    /// Peak bytes beyond the weights.
    pub activations: Bytes,
    /// Bytes of the UNet's feature maps, and of the text's keys and values.
    pub activations_unet: Bytes,
    /// Bytes of the decoder's feature maps.
    pub activations_decode: Bytes,
    /// Bytes to allocate with the choices of `memory`: weights that are not loaded yet, and activations.
    pub needed: Bytes,
    /// Bytes free on the device now, within the configured limits; null if they cannot be read.
    pub free: Option<Bytes>,
    /// True if `needed` is free, or would be after evicting the networks of other requests; null if that cannot be read.
    pub fits: Option<bool>,
    /// Memory choices that would be made now.
    pub memory: MemoryUse,
    /// All memory choices that the request leaves open, from the fastest to the one with the least memory.
    pub ways: Vec<MemoryStrategy>,
    /// The largest image of these proportions that fits, with any of these choices; null if even 64 pixels do not fit, or
    /// free memory cannot be read.
    pub largest: Option<Largest>,
    /// Evaluations of the UNet; the passes of guidance at one step count once.
    pub evaluations: usize,
    /// Seconds from the loaded model to the image; null until this process has made an image with it.
    pub seconds: Option<f64>,
}
