//! The steps of a generation: initial latents, denoising, guidance, decoding.

pub mod decode;
pub mod denoise;
pub mod estimate;
pub mod guidance;
pub mod preview;
pub mod thresholding;
