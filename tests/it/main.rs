//! Integration tests, one file a subject.

mod config;
mod device;
mod outputs;
