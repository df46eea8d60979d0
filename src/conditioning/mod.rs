//! The conditioning domain: from words to the tensors that guide the UNet.

pub mod canvas;
pub mod hints;
pub mod instructor;
pub mod interface;
pub mod manager;
mod reading;
pub mod script;
mod workers;

pub use workers::encode::Embeddings;
pub use workers::preprocess::{HintTask, PREPROCESSORS, Parameters, Preprocessor};
