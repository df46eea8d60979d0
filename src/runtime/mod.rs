//! The process: flags, configuration, lanes, and the dispatch of calls to instructors.

pub mod arguments;
pub mod config;
pub mod dispatch;
pub mod lane;
