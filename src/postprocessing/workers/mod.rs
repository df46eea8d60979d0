//! Workers of the postprocessing domain.

pub(crate) mod encode;
pub(super) mod read_text;
pub(super) mod write;
