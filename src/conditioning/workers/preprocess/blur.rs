//! Gaussian blur, equal to OpenCV's `GaussianBlur` of bytes.

use crate::conditioning::preprocessor::{ParameterSpec, PreprocessTask, Preprocessor};
use crate::conditioning::workers::preprocess::gaussian::blur_bytes;
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::layers::Worker;

pub(crate) struct Blur;

impl Preprocessor for Blur {
    fn parameters(&self) -> &'static [ParameterSpec] {
        &[ParameterSpec { name: "sigma", default: 9.0, min: 0.1, max: 64.0 }]
    }
}

impl Worker<PreprocessTask<'_>> for Blur {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, ctx: &Context) -> Result<Rgb8> {
        blur_bytes(task.image, task.parameters.sigma, ctx)
    }
}
