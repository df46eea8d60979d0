//! The text-to-image model.

use super::{Family, PIPELINES};

pub(super) const FAMILY: Family = Family {
    name: "sdxl_base",
    pipelines: PIPELINES,
    first_encoder: true,
    channels: 4,
    masks: false,
    edits: false,
    depths: None,
};
