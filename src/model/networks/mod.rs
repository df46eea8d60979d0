//! The networks of SDXL: both text encoders, UNet, VAE, ControlNets, adapters and their image encoders. A network is
//! configured by its `config.json`, or by the shapes of its tensors where a single file has none, and is written against
//! [`crate::kernels`] alone.
//!
//! Layout: feature maps are `[B, H, W, C]`, tokens `[B, L, C]`. Activations run in the dtype of the input; weights are
//! kept in the dtype of the file, or in the compute dtype where that is narrower. No network caches anything between calls.
//!
//! Every configuration has a `check`: networks that cannot be computed exactly as diffusers computes them are
//! `model_unsupported`, and so are sizes that no real network has, so that a hostile file cannot make the worker
//! divide by zero, overflow or allocate without bound.

pub mod attention;
pub(crate) mod check;
pub mod clip;
pub mod clip_vision;
pub(crate) mod config;
pub mod controlnet;
pub mod controlnet_config;
pub(crate) mod controlnet_union;
pub mod embeddings;
pub mod footprint;
pub mod interventions;
pub mod ip_adapter;
pub(crate) mod load_error;
pub mod resnet;
pub mod t2i_adapter;
pub(crate) mod tiling;
pub mod unet;
pub mod unet_blocks;
pub mod unet_config;
pub mod vae;

pub use check::Check;
pub use config::PerBlock;
