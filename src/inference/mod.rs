//! Generation of images.

pub mod guidance;
mod guiding;
pub mod instructor;
pub mod interface;
pub mod plan;
mod planning;
pub mod steering;
pub mod workers;
