//! A Gaussian blur, equal to OpenCV's `GaussianBlur` of bytes.

use crate::conditioning::workers::preprocess::gaussian::blur_bytes;
use crate::conditioning::workers::preprocess::{HintTask, Method, Parameter};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::layers::Worker;

pub(crate) struct Blur;

impl Method for Blur {
    fn parameters(&self) -> &'static [Parameter] {
        &[Parameter { name: "sigma", default: 9.0, least: 0.1, most: 64.0 }]
    }
}

impl Worker<HintTask<'_>> for Blur {
    type Output = Rgb8;

    fn run(&self, task: HintTask<'_>, ctx: &Context) -> Result<Rgb8> {
        blur_bytes(task.image, task.parameters.sigma, ctx)
    }
}
