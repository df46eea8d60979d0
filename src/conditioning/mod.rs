//! The conditioning domain: turns prompts and images into the tensors that condition the UNet.

pub mod hints;
pub mod image_adapters;
pub mod init_image;
pub mod instructor;
pub mod interface;
pub mod manager;
pub mod preprocessor;
pub(crate) mod prompt_encoding;
pub mod prompt_options;
pub(crate) mod prompt_plan;
pub mod prompt_schedule;
pub(crate) mod workers;

pub use workers::encode::Embeddings;
pub use workers::image_adapters::clip_pixels;
pub use workers::init_image::{PrepareInitImage, PrepareInitImageTask};
pub use workers::preprocess::PREPROCESSORS;
