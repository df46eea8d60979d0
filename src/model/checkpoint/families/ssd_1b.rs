//! Segmind's SSD-1B: SDXL with fewer transformers and none in the middle (Gupta et al. 2024,
//! <https://arxiv.org/abs/2401.02677>).

use crate::model::checkpoint::families::family::{Family, PIPELINES};

pub(crate) const FAMILY: Family = Family {
    name: "ssd_1b",
    pipelines: PIPELINES,
    first_encoder: true,
    channels: 4,
    masks: false,
    edits: false,
    depths: Some(&[0, 0, 2, 2, 4, 4]),
};
