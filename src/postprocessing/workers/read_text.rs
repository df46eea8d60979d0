//! Reads the texts of an image file without decoding its pixels.

use std::io::Cursor;

use image::codecs::jpeg::JpegDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ImageDecoder, ImageFormat, ImageResult};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::image::source::ImageFile;
use crate::layers::Worker;
use crate::postprocessing::workers::encode::exif::{self, ExifText};
use crate::postprocessing::workers::encode::{PARAMETERS, REQUEST};

/// Most bytes of a decompressed text.
const TEXT_LIMIT: usize = 4 << 20;

pub(crate) struct ReadImageText;

impl<'a> Worker<&'a ImageFile> for ReadImageText {
    type Output = ExifText;

    fn run(&self, file: &'a ImageFile, _ctx: &Context) -> Result<ExifText> {
        let damaged = |error: image::ImageError| Error::ImageDecodeFailed { message: error.to_string() };
        let bytes = Cursor::new(file.bytes.as_slice());
        match file.format {
            ImageFormat::Png => png_texts(bytes),
            ImageFormat::Jpeg => JpegDecoder::new(bytes).and_then(exif_texts).map_err(damaged),
            ImageFormat::WebP => WebPDecoder::new(bytes).and_then(exif_texts).map_err(damaged),
            other => Err(Error::bug(format!("{other:?} passed the format check"))),
        }
    }
}

fn exif_texts(mut decoder: impl ImageDecoder) -> ImageResult<ExifText> {
    Ok(decoder.exif_metadata()?.map(|block| exif::read(&block)).unwrap_or_default())
}

/// Reads the chunks before the pixels; the first of a keyword counts.
fn png_texts(bytes: Cursor<&[u8]>) -> Result<ExifText> {
    let reader = png::Decoder::new(bytes)
        .read_info()
        .map_err(|error| Error::ImageDecodeFailed { message: error.to_string() })?;
    let info = reader.info();
    let find = |keyword: &str| {
        let plain = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword);
        let compressed = || {
            let mut chunk = info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword)?.clone();
            chunk.decompress_text_with_limit(TEXT_LIMIT).ok()?;
            chunk.get_text().ok()
        };
        let utf8 = || {
            let mut chunk = info.utf8_text.iter().find(|chunk| chunk.keyword == keyword)?.clone();
            chunk.decompress_text_with_limit(TEXT_LIMIT).ok()?;
            chunk.get_text().ok()
        };
        plain.map(|chunk| chunk.text.clone()).or_else(utf8).or_else(compressed)
    };
    Ok(ExifText { parameters: find(PARAMETERS), request: find(REQUEST) })
}
