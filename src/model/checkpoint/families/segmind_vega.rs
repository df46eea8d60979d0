//! Segmind's Vega, smaller again than SSD-1B (Gupta et al. 2024, <https://arxiv.org/abs/2401.02677>).

use crate::model::checkpoint::families::family::{Family, PIPELINES};

pub(crate) const FAMILY: Family = Family {
    name: "segmind_vega",
    pipelines: PIPELINES,
    first_encoder: true,
    channels: 4,
    masks: false,
    edits: false,
    depths: Some(&[0, 0, 1, 1, 2, 2]),
};
