//! The networks of SDXL: both text encoders, UNet, VAE.
