//! The integration tests, one binary.

mod noise;
mod scheduler;
