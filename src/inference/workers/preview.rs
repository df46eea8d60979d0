//! A small preview of an image during denoising.

use candle_core::Tensor;

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::inference::request::memory::DecodeExtent;
use crate::inference::workers::decode::{Decode, DecodeTask};
use crate::layers::Worker;
use crate::model::networks::vae::{VaeConfig, VaeDecoder};

pub struct Preview;

pub struct PreviewTask<'a> {
    pub decoder: &'a VaeDecoder,
    pub config: &'a VaeConfig,
    /// `[B, H, W, C]`, f32: the latest estimate of the latents.
    pub x0: &'a Tensor,
    /// Longest side in pixels.
    pub max_side: usize,
    pub placement: &'a Placement,
}

impl Worker<PreviewTask<'_>> for Preview {
    /// The first image of the batch.
    type Output = Rgb8;

    fn run(&self, task: PreviewTask<'_>, ctx: &Context) -> Result<Rgb8> {
        let first = task.x0.narrow(0, 0, 1)?;
        let (_, height, width, _) = first.dims4()?;
        // Latents averaged over squares of `factor` decode to a picture that is smaller by as much.
        let factor = (height.max(width) * 8).div_ceil(task.max_side.max(64)).max(1).min(height.min(width));
        let small = if factor == 1 {
            first
        } else {
            let (rows, columns) = (height / factor, width / factor);
            let cut = first.narrow(1, 0, rows * factor)?.narrow(2, 0, columns * factor)?;
            let channels = cut.dim(3)?;
            cut.reshape((rows, factor, columns, factor * channels))?
                .mean(1)?
                .reshape((rows, columns, factor, channels))?
                .mean(2)?
                .unsqueeze(0)? // [1, rows, columns, C]
        };
        let PreviewTask { decoder, config, placement, .. } = task;
        let images = ctx.perform(
            &Decode,
            DecodeTask { decoder, config, latents: &small, placement, options: DecodeExtent::Whole, free: None },
        )?;
        images.into_iter().next().ok_or_else(|| Error::bug("the decoder gave no preview"))
    }
}
