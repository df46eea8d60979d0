//! Resizes an image as diffusers' `VaeImageProcessor` does: stretched, cropped or filled.

use crate::conditioning::init_image::ResizeMode;
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Region, Rgb8};
use crate::image::resample::Filter;
use crate::layers::Worker;
use crate::units::ImageSize;

pub(crate) struct Resize;

pub(crate) struct ResizeTask<'a> {
    pub(crate) image: &'a Rgb8,
    pub(crate) size: ImageSize,
    pub(crate) mode: ResizeMode,
}

impl Worker<ResizeTask<'_>> for Resize {
    /// An image of `size`.
    type Output = Rgb8;

    fn run(&self, task: ResizeTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        let ResizeTask { image, size, mode } = task;
        let ImageSize { width, height } = size;
        if (image.width, image.height) == (width, height) {
            return Ok(image.clone());
        }
        let scaled = |width, height| image.resized(width, height, Filter::Lanczos);
        // The width for the target height, and the height for the target width.
        let wide = image.width * height / image.height;
        let high = image.height * width / image.width;
        let flatter = width * image.height < height * image.width;
        match mode {
            ResizeMode::Stretch => scaled(width, height),
            ResizeMode::Crop => {
                let (w, h) = if flatter { (wide, height) } else { (width, high) };
                let (w, h) = (w.max(width), h.max(height));
                let region = Region { left: w / 2 - width / 2, top: h / 2 - height / 2, width, height };
                scaled(w, h)?.part(region)
            }
            ResizeMode::Fill => {
                let (w, h) = if flatter { (width, high) } else { (wide, height) };
                let (w, h) = (w.clamp(1, width), h.clamp(1, height));
                let (left, top) = (width / 2 - w / 2, height / 2 - h / 2);
                let margins = [left, top, width - left - w, height - top - h];
                extended(&scaled(w, h)?, margins)
            }
        }
    }
}

/// Adds margins in the way of the reference, which resizes a border of no height with a cubic filter: 9/8 of the
/// outermost line minus 1/8 of the next.
fn extended(image: &Rgb8, margins: [usize; 4]) -> Result<Rgb8> {
    let mut outer = image.clone();
    let (last_row, last_column) = (image.height - 1, image.width - 1);
    let value = |x: usize, y: usize, channel: usize| i32::from(image.data[3 * (y * image.width + x) + channel]);
    let beyond = |line: i32, next: i32| ((9 * line - next + 4) >> 3).clamp(0, 255) as u8;
    // Only one pair of sides has margins.
    let down = margins[1] + margins[3] > 0;
    for y in 0..image.height {
        for x in 0..image.width {
            let inner = match down {
                true if y == 0 => Some((x, 1.min(last_row))),
                true if y == last_row => Some((x, last_row.saturating_sub(1))),
                false if x == 0 => Some((1.min(last_column), y)),
                false if x == last_column => Some((last_column.saturating_sub(1), y)),
                _ => None,
            };
            let Some((inner_x, inner_y)) = inner else { continue };
            for channel in 0..3 {
                let line = beyond(value(x, y, channel), value(inner_x, inner_y, channel));
                outer.data[3 * (y * image.width + x) + channel] = line;
            }
        }
    }
    let mut grown = outer.grown(margins)?;
    let [left, top, ..] = margins;
    for (y, row) in image.data.chunks_exact(3 * image.width).enumerate() {
        let start = 3 * ((top + y) * grown.width + left);
        grown.data[start..start + row.len()].copy_from_slice(row);
    }
    Ok(grown)
}
