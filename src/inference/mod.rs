//! Generation of images.

pub mod blocks;
mod controlling;
pub mod controlnet;
mod drawing;
mod editing;
mod further;
pub mod guidance;
mod guiding;
pub mod instructor;
pub mod interface;
pub mod lora;
pub mod ladder;
pub mod memory;
pub mod plan;
mod planning;
mod rewriting;
mod residing;
pub mod steering;
pub mod workers;
