//! Brings an image that a network is shown to the size of the image that is generated.

use image::imageops::{FilterType, crop_imm, overlay, resize};
use image::{RgbImage, SubImage};

use crate::conditioning::interface::ResizeMode;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::pixels::Rgb8;
use crate::units::ImageSize;

pub(in crate::conditioning) struct Fit;

pub(in crate::conditioning) struct FitTask {
    pub(in crate::conditioning) image: Rgb8,
    pub(in crate::conditioning) size: ImageSize,
    pub(in crate::conditioning) mode: ResizeMode,
}

impl Worker<FitTask> for Fit {
    type Output = Rgb8;

    fn run(&self, task: FitTask, _: &Context) -> Result<Rgb8> {
        let FitTask { image, size, mode } = task;
        if (image.width, image.height) == (size.width, size.height) {
            return Ok(image);
        }
        let (from_width, from_height) = image.sides()?;
        let fits = |side: usize| u32::try_from(side).map_err(|_| Error::bug(format!("an image of {side} pixels")));
        let (width, height) = (fits(size.width)?, fits(size.height)?);
        let image = RgbImage::from_raw(from_width, from_height, image.data);
        let image = image.ok_or_else(|| Error::bug("an image has other bytes than its size says"))?;
        let scaled = |width: u32, height: u32| resize(&image, width.max(1), height.max(1), FilterType::Lanczos3);
        // The image's sides where the other one becomes that of the size, rounded down.
        let by_height = u64::from(from_width) * u64::from(height) / u64::from(from_height);
        let by_width = u64::from(from_height) * u64::from(width) / u64::from(from_width);
        let (by_height, by_width) = (u32::try_from(by_height), u32::try_from(by_width));
        let wider = u64::from(from_width) * u64::from(height) > u64::from(width) * u64::from(from_height);
        let beyond = || Error::ImageTooLarge { message: "its sides are too unequal to be fitted".to_owned() };
        let fitted = match mode {
            ResizeMode::Stretch => scaled(width, height),
            ResizeMode::Crop => {
                let (w, h) = if wider {
                    (by_height.map_err(|_| beyond())?, height)
                } else {
                    (width, by_width.map_err(|_| beyond())?)
                };
                if u64::from(w) * u64::from(h) > crate::image_source::ImageSource::MAX_PIXELS {
                    return Err(beyond());
                }
                let big = scaled(w, h);
                let (left, top) = ((w / 2).saturating_sub(width / 2), (h / 2).saturating_sub(height / 2));
                let part: SubImage<_> = crop_imm(&big, left, top, width, height);
                part.to_image()
            }
            ResizeMode::Fill => {
                let (w, h) = if wider {
                    (width, by_width.map_err(|_| beyond())?.max(1))
                } else {
                    (by_height.map_err(|_| beyond())?.max(1), height)
                };
                let small = scaled(w, h);
                let (left, top) = (width / 2 - w / 2, height / 2 - h / 2);
                // What is not covered repeats the nearest edge.
                let mut whole = RgbImage::from_fn(width, height, |x, y| {
                    let near = |at: u32, start: u32, length: u32| at.saturating_sub(start).min(length - 1);
                    *small.get_pixel(near(x, left, w), near(y, top, h))
                });
                overlay(&mut whole, &small, i64::from(left), i64::from(top));
                whole
            }
        };
        let (width, height) = (fitted.width() as usize, fitted.height() as usize);
        if (width, height) != (size.width, size.height) {
            return Err(Error::bug(format!("an image was brought to {width}×{height}")));
        }
        Ok(Rgb8 { width, height, data: fitted.into_raw() })
    }
}
