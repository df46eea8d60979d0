//! A model family, and the marks that identify it.

/// The marks of one family.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    pub name: &'static str,
    /// Values of `_class_name` in `model_index.json`.
    pub pipelines: &'static [&'static str],
    /// True if it has CLIP ViT-L besides OpenCLIP ViT-bigG.
    pub first_encoder: bool,
    /// `in_channels` of its UNet.
    pub channels: usize,
    /// True if its UNet takes the mask and the masked image concatenated with the latents.
    pub masks: bool,
    /// True if its UNet takes the image to edit concatenated with the latents.
    pub edits: bool,
    /// Transformer blocks of each layer of the down blocks; `None` matches any.
    pub depths: Option<&'static [usize]>,
}

/// diffusers' pipelines for text-to-image models.
pub(crate) const PIPELINES: &[&str] =
    &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"];
