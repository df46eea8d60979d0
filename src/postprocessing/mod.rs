//! What happens to finished images: encoding, metadata, files.

pub mod instructor;
pub mod interface;
pub mod metadata;
pub(crate) mod workers;

pub use workers::encode::{EncodeTask, Encoder, FORMATS, Format};
