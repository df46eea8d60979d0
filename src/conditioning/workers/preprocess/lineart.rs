//! Line art without a network, the "standard" line art of sd-webui-controlnet: light lines where the image is darker than
//! its surroundings. I = min over channels of (G_σ ∗ x - x), scaled so that its median above 8 becomes 127.

use crate::conditioning::preprocessor::{ParameterSpec, PreprocessTask, Preprocessor};
use crate::conditioning::workers::preprocess::gaussian::blur_floats;
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;

pub(crate) struct Lineart;

impl Preprocessor for Lineart {
    fn parameters(&self) -> &'static [ParameterSpec] {
        &[ParameterSpec { name: "sigma", default: 6.0, min: 0.5, max: 32.0 }]
    }
}

impl Worker<PreprocessTask<'_>> for Lineart {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, ctx: &Context) -> Result<Rgb8> {
        let Rgb8 { width, height, ref data } = *task.image;
        let around = blur_floats(task.image, task.parameters.sigma, ctx)?;
        let darker: Vec<f32> = around
            .chunks_exact(3)
            .zip(data.chunks_exact(3))
            .map(|(around, own)| {
                let least = around.iter().zip(own).map(|(a, &o)| a - f32::from(o)).fold(f32::INFINITY, f32::min);
                least.clamp(0.0, 255.0)
            })
            .collect();
        drop(around);
        ctx.checkpoint()?;
        // At least 16, so that noise is not amplified to lines.
        let unit = median(darker.iter().copied().filter(|&value| value > 8.0).collect()).unwrap_or(0.0).max(16.0);
        let data = darker.into_iter().map(|value| (value / unit * 127.0).clamp(0.0, 255.0) as u8).collect();
        Ok(Gray8 { width, height, data }.to_rgb())
    }
}

/// The median; the mean of the two middle values for an even count.
fn median(mut values: Vec<f32>) -> Option<f32> {
    let half = values.len() / 2;
    if values.is_empty() {
        return None;
    }
    let even = values.len().is_multiple_of(2);
    let (below, middle, _) = values.select_nth_unstable_by(half, f32::total_cmp);
    let middle = *middle;
    let before = below.iter().copied().max_by(f32::total_cmp).filter(|_| even);
    Some(before.map_or(middle, |before| f32::midpoint(before, middle)))
}
