//! Bicubic resampling of pixels: Keys' cubic with a = -0.5, as in Pillow.

use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::image::resample::Filter;
use crate::layers::Worker;
use crate::postprocessing::upscaler::UpscaleTask;

pub(crate) struct Bicubic;

impl Worker<UpscaleTask<'_, Rgb8>> for Bicubic {
    type Output = Rgb8;

    fn run(&self, task: UpscaleTask<'_, Rgb8>, _ctx: &Context) -> Result<Rgb8> {
        task.image.resized(task.width, task.height, Filter::Bicubic)
    }
}
