//! The wire: newline-delimited JSON on stdin and stdout. `PROTOCOL.md` in this folder is its contract.

pub mod dispatcher;
pub mod instructor;
pub mod interface;
pub mod lanes;
pub mod ledger;
mod pending_downloads;
pub mod queue;
pub mod responses;
pub mod schema;
pub mod serve;
mod signals;
pub mod workers;
