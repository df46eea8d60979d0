//! 255 less every byte: a drawing of dark lines becomes one of light lines, as ControlNets of lines want it.

use crate::conditioning::workers::preprocess::{HintTask, Method};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::layers::Worker;

pub(crate) struct Invert;

impl Method for Invert {}

impl Worker<HintTask<'_>> for Invert {
    type Output = Rgb8;

    fn run(&self, task: HintTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        let Rgb8 { width, height, ref data } = *task.image;
        Ok(Rgb8 { width, height, data: data.iter().map(|value| 255 - value).collect() })
    }
}
