//! Generation of images.

pub mod instructor;
pub mod interface;
pub mod managers;
pub mod plan;
pub mod request;
pub mod workers;
