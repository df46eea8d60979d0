//! Which device computes, in which dtype, and how much memory it has.

pub mod instructor;
pub mod interface;
pub mod manager;
pub(crate) mod workers;
