//! Generation of images.

pub mod instructor;
pub mod interface;
pub mod plan;
pub mod workers;
