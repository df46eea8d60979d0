//! The base model with mask and masked image concatenated with the latents.

use crate::model::checkpoint::families::family::Family;

pub(crate) const FAMILY: Family = Family {
    name: "sdxl_inpaint",
    pipelines: &["StableDiffusionXLInpaintPipeline"],
    first_encoder: true,
    channels: 9,
    masks: true,
    edits: false,
    depths: None,
};
