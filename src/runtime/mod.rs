//! The process: configuration, the compute thread, and dispatch of calls to instructors.

pub mod arguments;
pub mod config;
pub mod dispatch;
pub mod lane;
