//! Nearest-neighbour interpolation of latents.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::postprocessing::upscaler::UpscaleTask;
use crate::postprocessing::workers::upscale::interpolate::{Taps, interpolate};

pub(crate) struct LatentNearest;

impl Worker<UpscaleTask<'_, Tensor>> for LatentNearest {
    type Output = Tensor;

    fn run(&self, task: UpscaleTask<'_, Tensor>, _ctx: &Context) -> Result<Tensor> {
        interpolate(&task, |position, scale| Taps { first: (position as f64 * scale) as isize, weights: [1.0] })
    }
}
