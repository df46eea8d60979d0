//! Latents: encoding images, adding noise and masking.

use candle_core::Tensor;

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;
use crate::model::managers::Vae;
use crate::model::networks::vae::{Extent, VaeConfig};
use crate::noise::NoiseSource;
use crate::scheduler::plan::Level;

/// Runs the encoder.
pub struct EncodeLatents;

pub struct EncodeLatentsTask<'a> {
    pub vae: &'a Vae,
    pub config: &'a VaeConfig,
    /// `[1, H, W, 3]`, f32, -1..=1.
    pub pixels: &'a Tensor,
    /// Samples from the encoder's distribution; `None` takes its mode.
    pub noise: Option<&'a mut NoiseSource>,
    pub extent: Extent,
    pub placement: &'a Placement,
}

impl Worker<EncodeLatentsTask<'_>> for EncodeLatents {
    /// `[1, H/8, W/8, Z]`, f32, in the UNet's scale.
    type Output = Tensor;

    fn run(&self, task: EncodeLatentsTask<'_>, ctx: &Context) -> Result<Tensor> {
        let EncodeLatentsTask { vae, config, pixels, noise, extent, placement } = task;
        let pixels = pixels.to_dtype(placement.vae.tensor())?;
        let moments = vae.encoder.encode(&pixels, extent, &|| ctx.checkpoint())?;
        let z = match noise {
            Some(noise) => (&moments.mean + ((moments.logvar * 0.5)?.exp()? * noise.draw()?)?)?,
            None => moments.mean,
        };
        config.to_model(&z)
    }
}

/// The repainted part of an image.
pub struct Masking {
    /// `[1, H/8, W/8, 1]`, f32: 1 is repainted.
    pub mask: Tensor,
    /// Restored after each step, for a UNet without channels for the mask.
    pub outside: Option<Outside>,
    /// `[1, H/8, W/8, ·]`, f32, concatenated with the sample: the mask and the masked image for an inpainting UNet, the
    /// image for instruct-pix2pix.
    pub concat: Option<Tensor>,
}

/// The latents outside the mask: `[1, H/8, W/8, Z]` each, f32.
pub struct Outside {
    pub latents: Tensor,
    /// The noise that the pass began with.
    pub noise: Tensor,
}

impl Outside {
    /// `x` with the latents outside the mask restored at `level`; without noise for `None`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn restore(&self, mask: &Tensor, x: &Tensor, level: Option<Level>) -> Result<Tensor> {
        let latents = match level {
            Some(level) => noised(&self.latents, &self.noise, level)?,
            None => self.latents.clone(),
        };
        Ok((latents.broadcast_mul(&(1.0 - mask)?)? + x.broadcast_mul(mask)?)?)
    }
}

/// `α·latents + σ·noise`
///
/// # Errors
/// Those of the device.
pub fn noised(latents: &Tensor, noise: &Tensor, level: Level) -> Result<Tensor> {
    Ok(((latents * level.alpha)? + (noise * level.sigma)?)?)
}

/// The mask at the latents' size: every eighth pixel, as the reference takes them. `soft` keeps its greys, otherwise half
/// and more is 1.
///
/// # Errors
/// Those of the device.
pub fn latent_mask(mask: &Gray8, soft: bool, reduction: usize, placement: &Placement) -> Result<Tensor> {
    let (height, width) = (mask.height / reduction, mask.width / reduction);
    let value = |byte: u8| match soft {
        true => f32::from(byte) / 255.0,
        false => f32::from(u8::from(byte >= 128)),
    };
    let rows = mask.data.chunks_exact(mask.width.max(1)).step_by(reduction).take(height);
    let values: Vec<f32> =
        rows.flat_map(|row| row.iter().step_by(reduction).take(width).map(|&byte| value(byte))).collect();
    Ok(Tensor::from_vec(values, (1, height, width, 1), &placement.device)?)
}

/// The image with mid-grey where the mask is half and more: `[1, H, W, 3]`, f32.
///
/// # Errors
/// Those of the device.
pub fn masked_image(image: &Rgb8, mask: &Gray8, placement: &Placement) -> Result<Tensor> {
    let seen: Vec<f32> = mask.data.iter().map(|&byte| f32::from(u8::from(byte < 128))).collect();
    let seen = Tensor::from_vec(seen, (1, mask.height, mask.width, 1), &placement.device)?;
    Ok(image.to_tensor(&placement.device)?.broadcast_mul(&seen)?)
}
