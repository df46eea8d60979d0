//! Workers of the model domain.

pub(crate) mod control_lora;
pub(crate) mod dtype;
pub(crate) mod extract;
pub(crate) mod fp8_scales;
pub(crate) mod gguf;
pub(crate) mod ldm_names;
pub(crate) mod open;
pub(crate) mod read;
pub mod size;
