//! The model that refines the last steps; it has OpenCLIP's encoder only.

use crate::model::checkpoint::families::family::{Family, PIPELINES};

pub(crate) const FAMILY: Family = Family {
    name: "sdxl_refiner",
    pipelines: PIPELINES,
    first_encoder: false,
    channels: 4,
    masks: false,
    edits: false,
    depths: None,
};
