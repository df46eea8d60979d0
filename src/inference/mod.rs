//! Generation of images.

mod drawing;
mod editing;
mod further;
pub mod instructor;
pub mod interface;
pub mod plan;
mod planning;
pub mod workers;
