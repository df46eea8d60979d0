//! Lanczos resampling of pixels, with three lobes.

use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::image::resample::Filter;
use crate::layers::Worker;
use crate::postprocessing::upscaler::UpscaleTask;

pub(crate) struct Lanczos;

impl Worker<UpscaleTask<'_, Rgb8>> for Lanczos {
    type Output = Rgb8;

    fn run(&self, task: UpscaleTask<'_, Rgb8>, _ctx: &Context) -> Result<Rgb8> {
        task.image.resized(task.width, task.height, Filter::Lanczos)
    }
}
