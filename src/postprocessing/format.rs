//! The contract of an output format.
//!
//! A format is one file in `workers/encode/` and one entry in [`crate::postprocessing::FORMATS`].

use crate::image::pixels::Rgb8;
use crate::layers::Worker;
use crate::postprocessing::metadata::ImageText;

/// A format of image files.
pub struct Format {
    /// The name in the registry.
    pub name: &'static str,
    pub extension: &'static str,
    pub media_type: &'static str,
    pub lossless: bool,
    pub encoder: &'static Encoder,
}

pub type Encoder = dyn for<'a> Worker<EncodeTask<'a>, Output = Vec<u8>>;

/// One image to encode.
#[derive(Clone, Copy)]
pub struct EncodeTask<'a> {
    pub image: &'a Rgb8,
    /// 1 to 100; ignored by lossless formats.
    pub quality: u8,
    pub text: Option<&'a ImageText>,
}
