//! Removes fine detail: downsamples by averaging and upsamples again. A rate below 1.1 changes nothing.

use crate::conditioning::preprocessor::{ParameterSpec, PreprocessTask, Preprocessor};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::image::resample::Filter;
use crate::layers::Worker;

pub(crate) struct Tile;

impl Preprocessor for Tile {
    fn parameters(&self) -> &'static [ParameterSpec] {
        &[ParameterSpec { name: "down_sampling_rate", default: 1.0, min: 1.0, max: 32.0 }]
    }
}

impl Worker<PreprocessTask<'_>> for Tile {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, ctx: &Context) -> Result<Rgb8> {
        let rate = task.parameters.down_sampling_rate;
        if rate < 1.1 {
            return Ok(task.image.clone());
        }
        let fewer = |side: usize| ((side as f64 / rate) as usize).max(1);
        let (width, height) = (task.image.width, task.image.height);
        let small = averaged(task.image, fewer(width), fewer(height), ctx)?;
        ctx.checkpoint()?;
        small.resized(width, height, Filter::Lanczos)
    }
}

/// Each pixel of the result is the mean of the area that it covers.
fn averaged(image: &Rgb8, width: usize, height: usize, ctx: &Context) -> Result<Rgb8> {
    let (columns, rows) = (covers(image.width, width), covers(image.height, height));
    let mut data = Vec::with_capacity(3 * width * height);
    for row in &rows {
        ctx.checkpoint()?;
        for column in &columns {
            let mut sums = [0f32; 3];
            for &(y, high) in row {
                for &(x, wide) in column {
                    let pixel = &image.data[3 * (y * image.width + x)..][..3];
                    for (sum, &value) in sums.iter_mut().zip(pixel) {
                        *sum += high * wide * f32::from(value);
                    }
                }
            }
            data.extend(sums.map(|sum| sum.round_ties_even() as u8));
        }
    }
    Ok(Rgb8 { width, height, data })
}

/// For each of `to` equal parts of `from` pixels: the pixels it overlaps, and their share in it.
fn covers(from: usize, to: usize) -> Vec<Vec<(usize, f32)>> {
    let length = from as f64 / to as f64;
    (0..to)
        .map(|part| {
            let (begin, end) = (part as f64 * length, (part + 1) as f64 * length);
            let touched = begin as usize..(end.ceil() as usize).min(from);
            let share = |at: usize| ((at + 1) as f64).min(end) - (at as f64).max(begin);
            touched.map(|at| (at, (share(at) / length) as f32)).filter(|(_, share)| *share > 0.0).collect()
        })
        .collect()
}
