//! Generation of images.

pub mod instructor;
pub mod interface;
pub mod plan;
mod planning;
pub mod workers;
