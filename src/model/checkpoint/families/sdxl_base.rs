//! The text-to-image model.

use crate::model::checkpoint::families::family::{Family, PIPELINES};

pub(crate) const FAMILY: Family = Family {
    name: "sdxl_base",
    pipelines: PIPELINES,
    first_encoder: true,
    channels: 4,
    masks: false,
    edits: false,
    depths: None,
};
