//! Bicubic interpolation of latents: Keys' cubic with a = -0.75, as in torch.

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::postprocessing::upscaler::UpscaleTask;
use crate::postprocessing::workers::upscale::interpolate::{Taps, interpolate};

pub(crate) struct LatentBicubic;

impl Worker<UpscaleTask<'_, Tensor>> for LatentBicubic {
    type Output = Tensor;

    fn run(&self, task: UpscaleTask<'_, Tensor>, _ctx: &Context) -> Result<Tensor> {
        let near = |x: f64| (1.25 * x - 2.25) * x * x + 1.0;
        let far = |x: f64| ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0;
        interpolate(&task, |position, scale| {
            let centre = (position as f64 + 0.5) * scale - 0.5;
            let part = centre - centre.floor();
            let weights = [far(1.0 + part), near(part), near(1.0 - part), far(2.0 - part)];
            Taps { first: centre.floor() as isize - 1, weights }
        })
    }
}
