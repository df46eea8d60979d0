//! Workers of the model domain.

pub(super) mod open;
pub(super) mod overlay;
pub(super) mod read;
pub(super) mod rename;
