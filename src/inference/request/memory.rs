//! Memory on the wire: the choices that a request may make, those that were made for it, and their estimated cost.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// How much of an image is decoded, or encoded, at a time. The pixels are the same up to rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecodeExtent {
    /// `whole` if that much memory is free, otherwise `strips`.
    #[default]
    Auto,
    /// The whole image at once: the fastest.
    Whole,
    /// 64 rows at a time at each resolution: less than half the memory, up to twice the time.
    Strips,
}

/// Weights that leave the device while they are not used. The image is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// As few as memory allows.
    #[default]
    Auto,
    /// None, beyond those that the setting `text_encoders` releases.
    None,
    /// The text encoders, once the prompts are encoded.
    TextEncoders,
    /// The text encoders, and the UNet: its weights stay on the host, and each layer's are copied when it runs. On the CPU
    /// they stay in their files and are packed for the kernels at every use: slower, in less memory.
    Sequential,
}

/// A way to need less memory. Variants are in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    /// Caches, and networks that this request does not use, are evicted.
    Drop,
    /// Images are decoded some rows at a time.
    Strips,
    /// Guidance runs its passes one after another instead of in one batch.
    Slice,
    /// The text encoders are freed once the prompts are encoded.
    TextEncoders,
    /// The UNet's weights are copied to the device a layer at a time.
    Sequential,
}

impl Fallback {
    pub const ALL: [Self; 5] = [Self::Drop, Self::Strips, Self::Slice, Self::TextEncoders, Self::Sequential];
}

/// Memory choices of the request and the configuration; the others are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    pub decode: DecodeExtent,
    /// `None`: only if memory is short.
    pub slice: Option<bool>,
    pub offload: Offload,
    /// True if the UNet cannot be offloaded layer by layer.
    pub whole_unet: bool,
}

/// Memory choices in effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct MemoryPlan {
    /// Images are decoded `whole` or in `strips`.
    pub decode: DecodeExtent,
    /// True if guidance runs its passes one after another.
    pub slice: bool,
    /// Offloaded weights: `none`, `text_encoders` or `sequential`.
    pub offload: Offload,
}

/// Memory choices in effect, and the reason for them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct MemoryUse {
    #[serde(flatten)]
    pub plan: MemoryPlan,
    /// Fallbacks taken because memory was short, in that order. Choices of the request or the configuration are not among
    /// them.
    #[serde(rename = "rungs")]
    pub fallbacks: Vec<Fallback>,
    /// The reason: bytes that were needed and free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Bytes of one network's weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct PartBytes {
    /// `text_encoders`, `unet`, `vae`, `controlnet`, `adapter`, `lora`; on the CPU `tokenizers`
    pub part: &'static str,
    /// The model's name in requests.
    pub name: String,
    pub bytes: Bytes,
    /// Part of `bytes` that stays in mapped files.
    pub mapped: Bytes,
    /// True if they are in memory already.
    pub loaded: bool,
}

/// One way to make the image, and its cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct MemoryStrategy {
    /// The last fallback that is taken; `null` for none.
    #[serde(rename = "rung")]
    pub fallback: Option<Fallback>,
    /// Bytes to allocate.
    pub needed: Bytes,
    /// True if they are free; from `drop` on, once everything that the request does not use is evicted.
    pub fits: Option<bool>,
}

/// The largest image of the request's proportions that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Largest {
    /// Pixels, a multiple of 64.
    pub width: usize,
    /// Pixels, a multiple of 64.
    pub height: usize,
}
