//! The steps of a generation: initial latents, denoising, guidance, decoding.

pub mod adapters;
pub mod controlnet;
pub mod decode;
pub mod denoise;
pub mod guidance;
pub mod latents;
mod network;
pub mod paste;
pub mod prepare;
pub mod preview;
pub mod prompts;
pub mod step;
pub mod thresholding;
