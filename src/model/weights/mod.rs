//! Files of weights: their formats, names and sizes, and reading tensors from them.

pub(crate) mod control_lora;
pub(crate) mod dtype;
pub(crate) mod extract;
pub(crate) mod fp8_scales;
pub(crate) mod gguf;
pub(crate) mod ldm_names;
pub(crate) mod open;
pub(crate) mod read;
pub(crate) mod safetensors;
pub mod size;
pub(crate) mod stored;
