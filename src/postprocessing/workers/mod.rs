//! Workers of the postprocessing domain.

pub(crate) mod encode;
pub(crate) mod read_text;
pub(crate) mod upscale;
pub(crate) mod write;
