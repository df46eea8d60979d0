//! 255 minus every byte: turns dark lines into the light lines that line ControlNets expect.

use crate::conditioning::preprocessor::{PreprocessTask, Preprocessor};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::layers::Worker;

pub(crate) struct Invert;

impl Preprocessor for Invert {}

impl Worker<PreprocessTask<'_>> for Invert {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        let Rgb8 { width, height, ref data } = *task.image;
        Ok(Rgb8 { width, height, data: data.iter().map(|value| 255 - value).collect() })
    }
}
