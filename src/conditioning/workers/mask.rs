//! Blurs masks, and finds the region around their white part.

use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Region, mirrored};
use crate::layers::Worker;
use crate::units::ImageSize;

/// Gaussian blur with a window of 2.5 standard deviations to each side, as AUTOMATIC1111 blurs masks; the border is
/// mirrored without repeating it.
pub(crate) struct BlurMask;

pub(crate) struct BlurMaskTask<'a> {
    pub(crate) mask: &'a Gray8,
    /// Standard deviation in pixels.
    pub(crate) sigma: f64,
}

impl Worker<BlurMaskTask<'_>> for BlurMask {
    type Output = Gray8;

    fn run(&self, task: BlurMaskTask<'_>, ctx: &Context) -> Result<Gray8> {
        let BlurMaskTask { mask, sigma } = task;
        let reach = (2.5 * sigma + 0.5) as usize;
        let weight = |at: usize| (-0.5 * (at as f64 / sigma).powi(2)).exp();
        let total = 1.0 + 2.0 * (1..=reach).map(weight).sum::<f64>();
        let kernel: Vec<f32> = (0..=reach).map(|at| (weight(at) / total) as f32).collect();
        let (width, height) = (mask.width, mask.height);
        let mut across = Vec::with_capacity(width * height);
        let mut line = Vec::with_capacity(width + 2 * reach);
        for row in mask.data.chunks_exact(width.max(1)) {
            ctx.checkpoint()?;
            line.clear();
            let around = -(reach as isize)..(width + reach) as isize;
            line.extend(around.map(|at| f32::from(row[mirrored(at, width)])));
            across.extend(line.windows(2 * reach + 1).map(|window| {
                let pair = |far: usize| window[reach - far] + window[reach + far];
                kernel.iter().enumerate().skip(1).fold(kernel[0] * window[reach], |sum, (far, w)| sum + w * pair(far))
            }));
        }
        let mut data = Vec::with_capacity(width * height);
        let mut sum = vec![0f32; width];
        for y in 0..height {
            ctx.checkpoint()?;
            let row = |at: isize| {
                let start = mirrored(at, height) * width;
                &across[start..start + width]
            };
            sum.iter_mut().zip(row(y as isize)).for_each(|(sum, value)| *sum = kernel[0] * value);
            for (far, weight) in kernel.iter().enumerate().skip(1) {
                let pair = row(y as isize - far as isize).iter().zip(row((y + far) as isize));
                sum.iter_mut().zip(pair).for_each(|(sum, (above, below))| *sum += weight * (above + below));
            }
            data.extend(sum.iter().map(|sum| sum.round().clamp(0.0, 255.0) as u8));
        }
        Ok(Gray8 { width, height, data })
    }
}

/// The smallest region with all masked pixels, grown by `padding` and then to the proportions of `size` within the image.
/// The whole image if nothing is masked.
pub(crate) fn masked_region(mask: &Gray8, padding: usize, size: ImageSize) -> Region {
    let (width, height) = (mask.width as i64, mask.height as i64);
    let rows: Vec<bool> = mask.data.chunks_exact(mask.width).map(|row| row.iter().any(|value| *value > 0)).collect();
    let column = |x: usize| mask.data.iter().skip(x).step_by(mask.width).any(|value| *value > 0);
    let columns: Vec<bool> = (0..mask.width).map(column).collect();
    let ends =
        |masked: &[bool]| Some((masked.iter().position(|m| *m)? as i64, masked.iter().rposition(|m| *m)? as i64 + 1));
    let (Some((left, right)), Some((top, bottom))) = (ends(&columns), ends(&rows)) else {
        return Region { left: 0, top: 0, width: mask.width, height: mask.height };
    };
    let padding = padding as i64;
    let mut x = ((left - padding).max(0), (right + padding).min(width));
    let mut y = ((top - padding).max(0), (bottom + padding).min(height));
    let wanted = size.width as f64 / size.height as f64;
    if (x.1 - x.0) as f64 / (y.1 - y.0) as f64 > wanted {
        y = grown(y, ((x.1 - x.0) as f64 / wanted - (y.1 - y.0) as f64) as i64, height);
    } else {
        x = grown(x, ((y.1 - y.0) as f64 * wanted - (x.1 - x.0) as f64) as i64, width);
    }
    let side = |(from, to): (i64, i64)| (from as usize, (to - from) as usize);
    let ((left, width), (top, height)) = (side(x), side(y));
    Region { left, top, width, height }
}

/// Grows a span by `more`, half on each side, and moves it into `0..most` or cuts it there.
fn grown((from, to): (i64, i64), more: i64, most: i64) -> (i64, i64) {
    let (mut from, mut to) = (from - more / 2, to + more - more / 2);
    if to >= most {
        from -= to - most;
        to = most;
    }
    if from < 0 {
        to -= from;
        from = 0;
    }
    (from, to.min(most))
}
