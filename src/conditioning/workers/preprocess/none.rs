//! The image itself: for hints that were made elsewhere.

use crate::conditioning::preprocessor::{PreprocessTask, Preprocessor};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::layers::Worker;

pub(crate) struct None;

impl Preprocessor for None {}

impl Worker<PreprocessTask<'_>> for None {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        Ok(task.image.clone())
    }
}
