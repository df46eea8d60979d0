//! The postprocessing domain.

pub mod instructor;
pub mod interface;
mod workers;
