//! Luminance, equal to OpenCV's `COLOR_RGB2GRAY`: ITU-R 601 in 15-bit fixed point.

use crate::conditioning::preprocessor::{PreprocessTask, Preprocessor};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;

pub(crate) struct Grayscale;

impl Preprocessor for Grayscale {}

impl Worker<PreprocessTask<'_>> for Grayscale {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, _ctx: &Context) -> Result<Rgb8> {
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
