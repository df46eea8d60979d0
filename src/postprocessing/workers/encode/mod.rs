//! Output formats by name. An encoder turns an image and its text into the bytes of a file.

pub(crate) mod exif;
pub(crate) mod jpeg;
pub(crate) mod png;
pub(crate) mod webp;

pub(crate) use self::png::{PARAMETERS, REQUEST};

use crate::postprocessing::format::Format;
use crate::registry::Registry;

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
