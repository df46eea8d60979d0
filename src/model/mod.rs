//! Checkpoints, weights and networks.

mod assembly;
mod beside;
pub mod catalog;
pub mod checkpoint;
pub mod companion;
pub mod demo;
mod derive;
pub mod families;
mod fetching;
mod folder;
pub mod hub;
mod foreign;
pub mod instructor;
pub mod interface;
pub mod inversion;
pub mod lora;
pub mod managers;
pub mod networks;
mod peft;
pub mod weighing;
mod workers;
