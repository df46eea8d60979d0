//! Bytes in, bytes out.

pub mod bar;
pub mod codec;
pub mod descriptor;
pub mod reader;
pub mod writer;
