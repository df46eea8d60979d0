//! White where all channels of a pixel are above the threshold, black elsewhere.

use crate::conditioning::preprocessor::{ParameterSpec, PreprocessTask, Preprocessor};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;

pub(crate) struct Threshold;

impl Preprocessor for Threshold {
    fn parameters(&self) -> &'static [ParameterSpec] {
        &[ParameterSpec { name: "threshold", default: 127.0, min: 0.0, max: 255.0 }]
    }
}

impl Worker<PreprocessTask<'_>> for Threshold {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        let Rgb8 { width, height, ref data } = *task.image;
        let bright = |pixel: &[u8]| pixel.iter().all(|&value| f64::from(value) > task.parameters.threshold);
        let data = data.chunks_exact(3).map(|pixel| if bright(pixel) { 255 } else { 0 }).collect();
        Ok(Gray8 { width, height, data }.to_rgb())
    }
}
