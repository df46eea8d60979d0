//! Noise schedules and samplers.

pub(crate) mod aliases;
pub mod edm;
pub mod instructor;
pub mod interface;
pub mod schedule;
pub(crate) mod trajectory;
pub mod workers;
