//! Lossless WebP, with the text in EXIF.

use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::postprocessing::format::EncodeTask;
use crate::postprocessing::workers::encode::exif;

/// Longest side of the format in pixels.
const MAX_SIDE: u32 = 16_384;

pub(crate) struct WebP;

impl<'a> Worker<EncodeTask<'a>> for WebP {
    type Output = Vec<u8>;

    fn run(&self, task: EncodeTask<'a>, _ctx: &Context) -> Result<Vec<u8>> {
        let (width, height) = task.image.sides()?;
        if width > MAX_SIDE || height > MAX_SIDE {
            return Err(Error::ImageTooLarge {
                message: format!("a WebP has at most {MAX_SIDE} pixels a side, got {width} × {height}"),
            });
        }
        let failed = |error: &dyn std::fmt::Display| Error::bug(format!("webp: {error}"));
        let mut bytes = Vec::new();
        let mut encoder = WebPEncoder::new_lossless(&mut bytes);
        if let Some(text) = task.text {
            let block = exif::write(&text.parameters, Some(&text.request));
            encoder.set_exif_metadata(block).map_err(|error| failed(&error))?;
        }
        encoder
            .write_image(&task.image.data, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| failed(&error))?;
        Ok(bytes)
    }
}
