//! Generation of images.

pub mod controlnet;
mod controlling;
pub mod instructor;
pub mod interface;
pub mod plan;
mod planning;
pub mod workers;
