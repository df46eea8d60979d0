//! Checkpoints, weights and networks.

pub mod catalog;
pub mod checkpoint;
pub mod hub;
pub mod instructor;
pub mod interface;
pub mod lora;
pub mod managers;
pub mod networks;
pub mod textual_inversion;
pub mod weights;
