//! The base model with the image to edit concatenated with the latents (Brooks et al. 2022,
//! <https://arxiv.org/abs/2211.09800>); CosXL Edit is one.

use crate::model::checkpoint::families::family::Family;

pub(crate) const FAMILY: Family = Family {
    name: "sdxl_instruct_pix2pix",
    pipelines: &["StableDiffusionXLInstructPix2PixPipeline"],
    first_encoder: true,
    channels: 8,
    masks: false,
    edits: true,
    depths: None,
};
