//! Workers of the model domain.

pub(in crate::model) mod adapt;
pub(super) mod adapting;
mod by_rows;
pub(super) mod digest;
pub(super) mod dtype;
pub(super) mod fetch;
mod gguf;
pub(super) mod names;
pub(super) mod naming;
pub(super) mod open;
pub(super) mod overlay;
pub(super) mod read;
pub(super) mod rename;
mod scales;
