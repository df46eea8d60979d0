//! The postprocessing domain: upscales, encodes and writes finished images.

pub(crate) mod format;
pub mod instructor;
pub mod interface;
pub mod metadata;
pub mod upscaler;
pub(crate) mod workers;

pub use format::{EncodeTask, Encoder, Format};
pub use workers::encode::FORMATS;
pub use workers::upscale::{UPSCALERS, find as find_upscaler};
