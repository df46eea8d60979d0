//! Workers of the conditioning domain.

pub(super) mod encode;
pub(super) mod prompt;
pub(super) mod schedule;
pub(super) mod syntax;
mod weigh;
