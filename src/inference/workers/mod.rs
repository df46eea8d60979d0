//! The steps of a generation: initial latents, denoising, guidance, decoding.

pub mod adapters;
pub mod control;
pub mod decode;
pub mod denoise;
pub mod guidance;
pub mod latents;
pub mod paste;
pub mod preview;
pub mod prompts;
pub mod thresholding;
