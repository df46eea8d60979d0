//! Checkpoints, weights and networks.

pub mod instructor;
pub mod interface;
pub mod managers;
pub mod networks;
mod workers;
