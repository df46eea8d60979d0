//! Noise schedules and samplers.

pub mod edm;
pub mod interface;
pub mod schedule;
pub mod workers;
mod route;
mod names;
pub mod instructor;
