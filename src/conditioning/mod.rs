//! The conditioning domain: from words to the tensors that guide the UNet.

pub mod adapters;
pub mod canvas;
pub mod hints;
pub mod instructor;
pub mod interface;
pub mod manager;
mod reading;
pub mod script;
mod workers;

pub use workers::encode::Embeddings;
pub use workers::picture::clip_pixels;
pub use workers::preprocess::{HintTask, PREPROCESSORS, Parameters, Preprocessor};
