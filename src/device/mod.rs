//! Which device computes, in which dtype, and how much memory it has.

pub mod instructor;
pub mod interface;
pub mod manager;
pub mod scope;
pub(crate) mod workers;
