//! Answers of the inference domain.

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
    /// The file's bytes, where the request asked for them in place of a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    pub format: &'static str,
    pub seed: u64,
    /// The seed of its variation, where it has one.
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
    /// What was known from earlier requests.
    pub cache: CacheUse,
    /// How the images were made, as far as memory goes, and what was done for want of it.
    pub memory: MemoryUse,
    /// What each adapter did with its file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AppliedAdapter>,
}

/// Work that earlier requests had done already.
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

/// What a generation will need.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Estimate {
    /// Bytes of all weights as they will be held.
    pub weights: Bytes,
    /// The same by network.
    pub parts: Vec<PartBytes>,
    /// Bytes beyond the weights at the largest moment.
    pub activations: Bytes,
    /// Bytes of the UNet's feature maps, the text as it reads it included.
    pub activations_unet: Bytes,
    /// Bytes of the decoder's feature maps.
    pub activations_decode: Bytes,
    /// Bytes still to be had, in the way of `memory`: weights that are not in memory yet, and activations.
    pub needed: Bytes,
    /// Bytes free now on the device, where that can be read, within the limits of the configuration.
    pub free: Option<Bytes>,
    /// Whether `needed` is free, or would be once what others use is dropped.
    pub fits: Option<bool>,
    /// How the image would be made now.
    pub memory: MemoryUse,
    /// Every way to make it, from the fastest to that in the least memory, as far as the request leaves them open.
    pub ways: Vec<MemoryStrategy>,
    /// The largest image of these proportions that fits, in whichever way; null where even 64 pixels do not, or what is free
    /// cannot be read.
    pub largest: Option<Largest>,
    /// Evaluations of the UNet, each of all the passes that guidance needs at its step.
    pub evaluations: usize,
    /// Seconds from the model being loaded to the image; null until this process has made an image with it.
    pub seconds: Option<f64>,
}
