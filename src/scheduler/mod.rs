//! Noise schedules and samplers.

pub(crate) mod aliases;
pub mod config;
pub mod edm;
pub mod instructor;
pub mod interface;
pub mod plan;
pub mod sampler;
pub mod schedule;
pub(crate) mod trajectory;
pub mod workers;
