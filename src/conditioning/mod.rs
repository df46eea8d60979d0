//! The conditioning domain.

pub mod instructor;
pub mod interface;
mod workers;
