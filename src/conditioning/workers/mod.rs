//! Workers of the conditioning domain.

pub(super) mod encode;
pub(super) mod hint;
pub(super) mod prompt;
