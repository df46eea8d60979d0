//! JPEG: small and lossy, with the text in EXIF, which holds at most 64 KiB.

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::postprocessing::format::EncodeTask;
use crate::postprocessing::workers::encode::exif;

/// Bytes of an `APP1` segment minus its length field and the six bytes of `Exif\0\0`.
const EXIF_LIMIT: usize = 65_535 - 2 - 6;

pub(crate) struct Jpeg;

impl<'a> Worker<EncodeTask<'a>> for Jpeg {
    type Output = Vec<u8>;

    fn run(&self, task: EncodeTask<'a>, ctx: &Context) -> Result<Vec<u8>> {
        let (width, height) = task.image.sides()?;
        if width > u32::from(u16::MAX) || height > u32::from(u16::MAX) {
            return Err(Error::ImageTooLarge {
                message: format!("a JPEG has at most 65535 pixels a side, got {width} × {height}"),
            });
        }
        let mut bytes = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut bytes, task.quality);
        if let Some(text) = task.text {
            let full = exif::write(&text.parameters, Some(&text.request));
            let block = if full.len() <= EXIF_LIMIT { full } else { exif::write(&text.parameters, None) };
            if block.len() <= EXIF_LIMIT {
                encoder.set_exif_metadata(block).map_err(|error| Error::bug(format!("jpeg: {error}")))?;
            } else {
                ctx.warn("the parameters are longer than a JPEG can carry, so the image has none");
            }
        }
        encoder
            .write_image(&task.image.data, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| Error::bug(format!("jpeg: {error}")))?;
        Ok(bytes)
    }
}
