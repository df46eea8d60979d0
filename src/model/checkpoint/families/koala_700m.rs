//! KOALA-700M: one layer a resolution and no middle (Lee et al. 2023, <https://arxiv.org/abs/2312.04005>).

use crate::model::checkpoint::families::family::{Family, PIPELINES};

pub(crate) const FAMILY: Family = Family {
    name: "koala_700m",
    pipelines: PIPELINES,
    first_encoder: true,
    channels: 4,
    masks: false,
    edits: false,
    depths: Some(&[0, 2, 5]),
};
