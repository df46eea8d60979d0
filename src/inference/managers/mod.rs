//! Runs a plan: the loop over passes, and where weights and feature maps are kept.

pub(crate) mod estimate;
pub(crate) mod memory;
pub(crate) mod pipeline;
