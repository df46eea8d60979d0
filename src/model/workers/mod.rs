//! Workers of the model domain.

pub(in crate::model) mod adapt;
mod gguf;
pub(super) mod naming;
pub(super) mod open;
pub(super) mod overlay;
pub(super) mod read;
pub(super) mod rename;
