//! The model that refines the last steps; it has OpenCLIP's encoder only.

use super::Family;

pub(super) const FAMILY: Family = Family {
    name: "sdxl_refiner",
    pipelines: &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"],
    first_encoder: false,
    channels: 4,
};
