//! The integration tests, one binary.

mod conditioning;
mod model;
