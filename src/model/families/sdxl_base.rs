//! The text-to-image model.

use super::Family;

pub(super) const FAMILY: Family = Family {
    name: "sdxl_base",
    pipelines: &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"],
    first_encoder: true,
    channels: 4,
};
