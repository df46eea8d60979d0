//! Options of image to image, inpainting and outpainting, and the prepared init image with its mask.

use serde::{Deserialize, Serialize};

use crate::image::pixels::{Gray8, Region, Rgb8};
use crate::image::source::ImageFile;
use crate::units::ImageSize;

/// How an image of another size is resized to the working size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ResizeMode {
    /// Stretched to the size.
    #[default]
    Stretch,
    /// Scaled to cover the size, and cropped at the centre.
    Crop,
    /// Scaled to fit into the size, and filled with its own border.
    Fill,
}

/// The content of the masked part before it is repainted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InpaintingFill {
    /// The colours around it, blurred inwards.
    Fill,
    /// The image itself.
    #[default]
    Original,
    /// Noise for latents.
    Noise,
    /// Zeros for latents.
    Zeros,
}

/// Pixels added to each side of an image, multiples of 8; the new area is repainted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct Margins {
    /// 0 to 4096. Default: 0.
    pub left: i64,
    /// 0 to 4096. Default: 0.
    pub top: i64,
    /// 0 to 4096. Default: 0.
    pub right: i64,
    /// 0 to 4096. Default: 0.
    pub bottom: i64,
}

/// An init image with its options, decided.
#[derive(Clone, Debug)]
pub struct InitImageOptions {
    pub image: ImageFile,
    /// Left, top, right, bottom.
    pub margins: [usize; 4],
    pub resize: ResizeMode,
    pub mask: Option<MaskOptions>,
}

/// The part to repaint, decided.
#[derive(Clone, Debug)]
pub struct MaskOptions {
    /// White is repainted; `None` repaints the margins only.
    pub image: Option<ImageFile>,
    pub invert: bool,
    /// Standard deviation of the blur in pixels.
    pub blur: f64,
    /// Padding in pixels around the masked region ("only masked"); `None` works on the whole image.
    pub only_masked: Option<usize>,
    pub fill: InpaintingFill,
    /// True if the unmasked part of the original replaces that part of the result.
    pub paste: bool,
}

/// An init image prepared for the VAE.
#[derive(Clone, Debug)]
pub struct InitImage {
    /// The image to encode, of the working size.
    pub image: Rgb8,
    /// The mask, of the working size; white is repainted.
    pub mask: Option<Gray8>,
    pub paste: Option<Paste>,
    /// The part that is worked on; `None` for the whole image.
    pub cut: Option<Cut>,
}

/// A region of an image with its margins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The image's size with its margins.
    pub whole: ImageSize,
    pub region: Region,
}

/// How a result is pasted into the original.
#[derive(Clone, Debug)]
pub struct Paste {
    pub original: Rgb8,
    /// The mask, of the original's size.
    pub mask: Gray8,
    /// The region of the original that the result replaces.
    pub region: Region,
}

impl InitImageOptions {
    /// The image's size with its margins.
    #[must_use]
    pub fn size(&self) -> ImageSize {
        let [left, top, right, bottom] = self.margins;
        ImageSize { width: self.image.width + left + right, height: self.image.height + top + bottom }
    }
}
