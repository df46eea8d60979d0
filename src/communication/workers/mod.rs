//! The algorithms of the wire: reading, decoding, writing, logging.

pub mod bar;
pub mod codec;
pub mod descriptor;
pub mod log;
pub mod reader;
pub mod writer;
