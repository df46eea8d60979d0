//! What a request may say of memory, and what is said of it: how an image is made in less of it, and what that is
//! estimated to take.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// How much of a picture is decoded, or encoded, at a time. The pixels are the same but for rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecodeExtent {
    /// `whole` where that much memory is free, otherwise `strips`.
    #[default]
    Auto,
    /// All of it: the fastest.
    Whole,
    /// 64 rows at each resolution: less than half the memory, for up to twice the time.
    Strips,
}

/// Which weights leave the device while they are not used. The image is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// As few as there is room for.
    #[default]
    Auto,
    /// None, beyond what the setting `text_encoders` says.
    None,
    /// The text encoders, when the prompts have been encoded.
    TextEncoders,
    /// Those too, and the UNet's weights stay on the host, from where each layer's come when its turn is there. On the CPU
    /// they stay in their files, and are laid out for the kernels at every use: slower, in less memory.
    Sequential,
}

/// A way to need less memory, in the order in which they are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    /// Caches, and networks that this request does not use, are dropped.
    Drop,
    /// Pictures are decoded some rows at a time.
    Strips,
    /// The passes of guidance are made one after another, not in one batch.
    Slice,
    /// The text encoders leave when the prompts have been encoded.
    TextEncoders,
    /// The UNet's weights come a layer at a time.
    Sequential,
}

impl Fallback {
    pub const ALL: [Self; 5] = [Self::Drop, Self::Strips, Self::Slice, Self::TextEncoders, Self::Sequential];
}

/// What a request and the configuration leave open, or do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    pub decode: DecodeExtent,
    /// `None`: where room is short.
    pub slice: Option<bool>,
    pub offload: Offload,
    /// Whether the UNet's weights cannot come a layer at a time.
    pub whole_unet: bool,
}

/// How an image is made, as far as memory goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct MemoryPlan {
    /// Whether pictures are decoded `whole` or in `strips`.
    pub decode: DecodeExtent,
    /// Whether the passes of guidance are made one after another.
    pub slice: bool,
    /// Which weights leave: `none`, `text_encoders` or `sequential`.
    pub offload: Offload,
}

/// What was done for want of memory, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct MemoryUse {
    #[serde(flatten)]
    pub means: MemoryPlan,
    /// What was chosen because room was short, in that order. What the request or the configuration asked for is not among
    /// them.
    #[serde(rename = "rungs")]
    pub fallbacks: Vec<Fallback>,
    /// Why: the bytes that were needed and free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Bytes of one network's weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct PartBytes {
    /// `text_encoders`, `unet`, `vae`, `controlnet`, `adapter`, `lora`; on the CPU `tokenizers`
    pub part: &'static str,
    /// What requests call its model.
    pub name: String,
    pub bytes: Bytes,
    /// What of them stays in its files, which are mapped.
    pub mapped: Bytes,
    /// Whether they are in memory already.
    pub loaded: bool,
}

/// One way to make the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct MemoryStrategy {
    /// The last rung that is taken; `null` for none.
    #[serde(rename = "rung")]
    pub fallback: Option<Fallback>,
    /// Bytes still to be had.
    pub needed: Bytes,
    /// Whether they are free; for `drop` and what follows, once everything else is dropped.
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
