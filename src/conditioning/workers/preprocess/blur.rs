//! A Gaussian blur, equal to OpenCV's `GaussianBlur` of bytes.

use super::gaussian::blur_bytes;
use super::{Dial, HintTask, Method};
use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::pixels::Rgb8;

pub(super) struct Blur;

impl Method for Blur {
    fn dials(&self) -> &'static [Dial] {
        &[Dial { name: "sigma", default: 9.0, least: 0.1, most: 64.0 }]
    }
}

impl Worker<HintTask<'_>> for Blur {
    type Output = Rgb8;

    fn run(&self, task: HintTask<'_>, ctx: &Context) -> Result<Rgb8> {
        blur_bytes(task.image, task.parameters.sigma, ctx)
    }
}
