//! Kinds of SDXL by what tells them apart in their files. Data: a network is configured by its own `config.json`, or by
//! the shapes of its tensors.

pub(crate) mod koala_1b;
pub(crate) mod koala_700m;
pub(crate) mod sdxl_base;
pub(crate) mod sdxl_inpaint;
pub(crate) mod sdxl_instruct_pix2pix;
pub(crate) mod sdxl_refiner;
pub(crate) mod segmind_vega;
pub(crate) mod ssd_1b;
pub mod variants;

use crate::registry::Registry;

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
const PIPELINES: &[&str] =
    &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"];

pub static FAMILIES: Registry<Family> = Registry::new(
    "model family",
    &[
        ("ssd_1b", &ssd_1b::FAMILY),
        ("segmind_vega", &segmind_vega::FAMILY),
        ("koala_700m", &koala_700m::FAMILY),
        ("koala_1b", &koala_1b::FAMILY),
        ("sdxl_base", &sdxl_base::FAMILY),
        ("sdxl_refiner", &sdxl_refiner::FAMILY),
        ("sdxl_inpaint", &sdxl_inpaint::FAMILY),
        ("sdxl_instruct_pix2pix", &sdxl_instruct_pix2pix::FAMILY),
    ],
);

impl Family {
    /// The family of a checkpoint with such parts: the first that fits, so that the particular comes before the general.
    #[must_use]
    pub fn detect(first_encoder: bool, channels: usize, depths: &[usize]) -> Option<&'static Self> {
        let fits = |family: &&Self| {
            family.first_encoder == first_encoder
                && family.channels == channels
                && family.depths.is_none_or(|own| own == depths)
        };
        FAMILIES.iter().map(|(_, family)| family).find(fits)
    }

    /// Whether any family comes as the pipeline `class`.
    #[must_use]
    pub fn knows(class: &str) -> bool {
        FAMILIES.iter().any(|(_, family)| family.pipelines.contains(&class))
    }
}
