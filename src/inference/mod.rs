//! Generation of images.

pub mod interface;
