//! LoRA and its relatives: finding adapter files, matching their keys with the layers of a checkpoint, and merging them
//! into the weights while a network is loaded.

mod adapter;
mod choice;
pub mod formats;
pub(crate) mod fused;
pub(crate) mod keys;
pub(crate) mod lookup;
pub(crate) mod merge;
pub(crate) mod peft;
mod stack;

pub use choice::{LoraChoice, LoraFacts, MOST};
pub use stack::LoraStack;
