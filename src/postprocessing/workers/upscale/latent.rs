//! Bilinear interpolation of latents.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::postprocessing::upscaler::UpscaleTask;
use crate::postprocessing::workers::upscale::interpolate::{Taps, interpolate};

pub(crate) struct Latent;

impl Worker<UpscaleTask<'_, Tensor>> for Latent {
    type Output = Tensor;

    fn run(&self, task: UpscaleTask<'_, Tensor>, _ctx: &Context) -> Result<Tensor> {
        interpolate(&task, |position, scale| {
            let centre = ((position as f64 + 0.5) * scale - 0.5).max(0.0);
            let part = centre.fract();
            Taps { first: centre.floor() as isize, weights: [1.0 - part, part] }
        })
    }
}
