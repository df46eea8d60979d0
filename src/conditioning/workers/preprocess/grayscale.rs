//! Luminance, equal to OpenCV's `COLOR_RGB2GRAY`: ITU-R 601 in 15-bit fixed point.

use crate::conditioning::workers::preprocess::{HintTask, Method};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;

pub(crate) struct Grayscale;

impl Method for Grayscale {}

impl Worker<HintTask<'_>> for Grayscale {
    type Output = Rgb8;

    fn run(&self, task: HintTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        Ok(luminance(task.image).to_rgb())
    }
}

pub(crate) fn luminance(image: &Rgb8) -> Gray8 {
    let one = |pixel: &[u8]| {
        let sum: u32 = pixel.iter().zip([9798u32, 19235, 3735]).map(|(&value, weight)| u32::from(value) * weight).sum();
        ((sum + (1 << 14)) >> 15) as u8
    };
    Gray8 { width: image.width, height: image.height, data: image.data.chunks_exact(3).map(one).collect() }
}
