//! Decodes latents to pixels.

use candle_core::Tensor;

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::inference::request::memory::DecodeExtent;
use crate::layers::Worker;
use crate::model::networks::vae::{Extent, VaeConfig, VaeDecoder};
use crate::units::Bytes;

pub struct Decode;

pub struct DecodeTask<'a> {
    pub decoder: &'a VaeDecoder,
    pub config: &'a VaeConfig,
    /// `[B, H, W, C]`, f32, in the UNet's scale.
    pub latents: &'a Tensor,
    pub placement: &'a Placement,
    pub options: DecodeExtent,
    /// Bytes free on the device; `None` if they cannot be read.
    pub free: Option<Bytes>,
}

impl Worker<DecodeTask<'_>> for Decode {
    /// One image for each sample, eight times as wide and high as the latents.
    type Output = Vec<Rgb8>;

    fn run(&self, task: DecodeTask<'_>, ctx: &Context) -> Result<Vec<Rgb8>> {
        let batch = task.latents.dim(0)?;
        let extent = self.extent(&task);
        let mut images = Vec::with_capacity(batch);
        // One at a time: the decoder's feature maps are the largest tensors of the whole work.
        for index in 0..batch {
            ctx.checkpoint()?;
            let latents = task.latents.narrow(0, index, 1)?;
            let latents = task.config.from_model(&latents)?.to_dtype(task.placement.vae.tensor())?;
            let pixels = task.decoder.decode(&latents, extent, &|| ctx.checkpoint())?; // [1, 8H, 8W, 3]
            images.extend(Rgb8::from_tensor(&pixels)?);
        }
        Ok(images)
    }
}

impl Decode {
    /// Whole if memory allows: strips take longer.
    fn extent(&self, task: &DecodeTask) -> Extent {
        let pixels = task.latents.elem_count() / task.latents.dim(0).unwrap_or(1).max(1) / task.config.latent_channels
            * task.config.reduction().pow(2);
        let whole = task.config.decode_bytes(pixels, task.placement.vae.tensor().size_in_bytes(), Extent::Whole);
        match (task.options, task.free) {
            (DecodeExtent::Whole, _) | (DecodeExtent::Auto, None) => Extent::Whole,
            (DecodeExtent::Auto, Some(free)) if free.0 >= whole as u64 => Extent::Whole,
            (DecodeExtent::Auto | DecodeExtent::Strips, _) => Extent::Strips,
        }
    }
}
