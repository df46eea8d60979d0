//! Output formats, by name. An encoder turns an image and its text into the bytes of a file.

pub(crate) mod exif;
pub(crate) mod jpeg;
pub(crate) mod png;
pub(crate) mod webp;

pub(crate) use self::png::{PARAMETERS, REQUEST};

use crate::image::pixels::Rgb8;
use crate::layers::Worker;
use crate::postprocessing::metadata::ImageText;
use crate::registry::Registry;

/// One image to encode.
#[derive(Clone, Copy)]
pub struct EncodeTask<'a> {
    pub image: &'a Rgb8,
    /// 1 to 100; lossless formats have no use for it.
    pub quality: u8,
    pub text: Option<&'a ImageText>,
}

pub type Encoder = dyn for<'a> Worker<EncodeTask<'a>, Output = Vec<u8>>;

/// A format of image files.
pub struct Format {
    /// As in the registry.
    pub name: &'static str,
    pub extension: &'static str,
    pub media_type: &'static str,
    pub lossless: bool,
    pub encoder: &'static Encoder,
}

pub static FORMATS: Registry<Format> = Registry::new(
    "output format",
    &[
        ("png", &Format { name: "png", extension: "png", media_type: "image/png", lossless: true, encoder: &png::Png }),
        (
            "jpeg",
            &Format { name: "jpeg", extension: "jpg", media_type: "image/jpeg", lossless: false, encoder: &jpeg::Jpeg },
        ),
        (
            "webp",
            &Format { name: "webp", extension: "webp", media_type: "image/webp", lossless: true, encoder: &webp::WebP },
        ),
    ],
);
