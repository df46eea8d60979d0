//! KOALA-1B: one layer a resolution (Lee et al. 2023, <https://arxiv.org/abs/2312.04005>).

use crate::model::checkpoint::families::family::{Family, PIPELINES};

pub(crate) const FAMILY: Family = Family {
    name: "koala_1b",
    pipelines: PIPELINES,
    first_encoder: true,
    channels: 4,
    masks: false,
    edits: false,
    depths: Some(&[0, 2, 6]),
};
