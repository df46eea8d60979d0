//! The wire: newline-delimited JSON on stdin and stdout. `PROTOCOL.md` beside this file is its contract.

pub mod floor;
pub mod instructor;
pub mod interface;
pub mod lines;
pub mod manager;
mod parking;
pub mod queue;
pub mod schema;
pub mod serve;
pub mod workers;
