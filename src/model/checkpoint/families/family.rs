//! What identifies a model family in its files.

/// What a checkpoint of one kind looks like.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    pub name: &'static str,
    /// Values of `_class_name` in `model_index.json`.
    pub pipelines: &'static [&'static str],
    /// Whether it has the CLIP ViT-L encoder besides OpenCLIP's.
    pub first_encoder: bool,
    /// `in_channels` of its UNet.
    pub channels: usize,
    /// Whether its UNet takes the mask and the masked image beside the latents.
    pub masks: bool,
    /// Whether its UNet takes the image that it edits beside the latents.
    pub edits: bool,
    /// How many transformers each layer of the way down has, from the highest resolution; `None` if they do not matter.
    pub depths: Option<&'static [usize]>,
}

/// The pipelines of diffusers that every text-to-image model works with.
pub(crate) const PIPELINES: &[&str] =
    &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"];
