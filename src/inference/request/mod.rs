//! Wire types of a generation request.

pub mod controlnet;
pub mod generate;
pub mod guidance;
pub mod lora;
pub mod lora_blocks;
pub mod memory;
pub mod result;
