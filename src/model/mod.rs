//! Checkpoints, weights and networks.

pub mod catalog;
pub mod checkpoint;
pub mod companion;
pub mod demo;
pub mod families;
mod fetching;
mod folder;
pub mod hub;
pub mod instructor;
pub mod interface;
pub mod inversion;
pub mod managers;
pub mod networks;
pub mod weighing;
mod workers;
