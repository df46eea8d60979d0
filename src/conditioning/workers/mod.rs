//! Workers of the conditioning domain.

pub(super) mod encode;
pub(super) mod fill;
pub(super) mod fit;
pub(super) mod mask;
pub(super) mod picture;
pub(super) mod preprocess;
pub(super) mod prompt;
pub(super) mod schedule;
pub(super) mod syntax;
mod weigh;
