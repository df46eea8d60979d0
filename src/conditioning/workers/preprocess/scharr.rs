//! Gradient magnitude by Scharr's operator on the luminance: (|dx| + |dy|) / 2, each clamped to 255, as in OpenCV's
//! tutorial on image derivatives.

use crate::conditioning::preprocessor::{PreprocessTask, Preprocessor};
use crate::conditioning::workers::preprocess::grayscale::luminance;
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8, mirrored};
use crate::layers::Worker;

pub(crate) struct Scharr;

impl Preprocessor for Scharr {}

impl Worker<PreprocessTask<'_>> for Scharr {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, ctx: &Context) -> Result<Rgb8> {
        let Gray8 { width, height, data } = luminance(task.image);
        let mut strengths = Vec::with_capacity(data.len());
        for y in 0..height {
            ctx.checkpoint()?;
            let row = |offset: isize| &data[mirrored(y.cast_signed() + offset, height) * width..][..width];
            let (above, own, below) = (row(-1), row(0), row(1));
            for x in 0..width {
                let (left, right) = (mirrored(x.cast_signed() - 1, width), mirrored(x.cast_signed() + 1, width));
                let at = |row: &[u8], x: usize| i32::from(row[x]);
                let across = |row: &[u8]| at(row, right) - at(row, left);
                let down = |x: usize| at(below, x) - at(above, x);
                let dx = 3 * across(above) + 10 * across(own) + 3 * across(below);
                let dy = 3 * down(left) + 10 * down(x) + 3 * down(right);
                let sum = dx.abs().min(255) + dy.abs().min(255);
                // Rounds half to even.
                strengths.push((sum / 2 + (sum & 1 & (sum >> 1))) as u8);
            }
        }
        Ok(Gray8 { width, height, data: strengths }.to_rgb())
    }
}
