//! The conditioning domain: from words to the tensors that guide the UNet.

pub mod hints;
pub mod image_adapters;
pub mod init_image;
pub mod instructor;
pub mod interface;
pub mod manager;
pub(crate) mod prompt_plan;
pub mod prompt_schedule;
pub(crate) mod workers;

pub use workers::encode::Embeddings;
pub use workers::image_adapters::clip_pixels;
pub use workers::preprocess::{HintTask, PREPROCESSORS, Parameters, Preprocessor};
