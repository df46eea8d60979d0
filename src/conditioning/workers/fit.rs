//! Brings a picture to a size, as the reference's image processor does: stretched, cut or filled.

use crate::conditioning::canvas::ResizeMode;
use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::pixels::{Region, Rgb8};
use crate::resample::Filter;
use crate::units::ImageSize;

pub(in crate::conditioning) struct Fit;

pub(in crate::conditioning) struct FitTask<'a> {
    pub(in crate::conditioning) image: &'a Rgb8,
    pub(in crate::conditioning) size: ImageSize,
    pub(in crate::conditioning) mode: ResizeMode,
}

impl Worker<FitTask<'_>> for Fit {
    /// Of `size`.
    type Output = Rgb8;

    fn run(&self, task: FitTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        let FitTask { image, size, mode } = task;
        let ImageSize { width, height } = size;
        if (image.width, image.height) == (width, height) {
            return Ok(image.clone());
        }
        let scaled = |width, height| image.resized(width, height, Filter::Lanczos);
        // Sides of the picture where one of them is the size's and the other follows it.
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
                scaled(w, h)?.grown([left, top, width - left - w, height - top - h])
            }
        }
    }
}
