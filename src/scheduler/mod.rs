//! Noise schedules and samplers.

pub mod instructor;
pub mod interface;
pub mod schedule;
pub mod workers;
