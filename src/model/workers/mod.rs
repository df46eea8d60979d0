//! Workers of the model domain.

pub(in crate::model) mod adapt;
pub(super) mod adapting;
pub(super) mod dtype;
mod gguf;
pub(super) mod names;
pub(super) mod naming;
pub(super) mod open;
pub(super) mod overlay;
pub(super) mod read;
pub(super) mod rename;
