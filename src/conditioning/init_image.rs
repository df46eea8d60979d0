//! An image that a request brings, as the work needs it: the picture that is encoded, the mask at its size, and how the
//! result goes back into the original.
//!
//! In order, as AUTOMATIC1111 does it: the image grows by its margins, the mask is inverted and blurred, the region
//! around what is masked is cut out where that alone shall be repainted, and everything is brought to the working size.

use serde::{Deserialize, Serialize};

use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::workers::inpaint_fill::{Fill, FillTask};
use crate::conditioning::workers::mask::{Blur, BlurTask, region};
use crate::conditioning::workers::resize::{Fit, FitTask};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Region, Rgb8};
use crate::image::source::ImageFile;
use crate::units::ImageSize;

/// How an image of other proportions is brought to the working size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ResizeMode {
    /// Stretched to the size.
    #[default]
    Stretch,
    /// Scaled until it covers the size, and cut at the centre.
    Crop,
    /// Scaled until it fits into the size, and filled with its own border.
    Fill,
}

/// What the part that is repainted holds before it is.
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

/// Pixels by which an image grows, each a multiple of 8; what is new is repainted.
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

/// An image and what is wanted of it, decided.
#[derive(Clone, Debug)]
pub struct InitImageOptions {
    pub image: ImageFile,
    /// Left, top, right, bottom.
    pub margins: [usize; 4],
    pub resize: ResizeMode,
    pub mask: Option<MaskOptions>,
}

/// Which part is repainted, decided.
#[derive(Clone, Debug)]
pub struct MaskOptions {
    /// White is repainted; `None` where the margins alone are.
    pub image: Option<ImageFile>,
    pub invert: bool,
    /// Standard deviation of the blur in pixels.
    pub blur: f64,
    /// Around what is masked, in pixels; `None` works on the whole image.
    pub only_masked: Option<usize>,
    pub fill: InpaintingFill,
    /// Whether the original comes back where nothing is masked.
    pub paste: bool,
}

/// An image ready for work.
#[derive(Clone, Debug)]
pub struct InitImage {
    /// What is encoded, of the working size.
    pub image: Rgb8,
    /// Of the working size; white is repainted.
    pub mask: Option<Gray8>,
    pub paste: Option<Paste>,
    /// The part that is worked on, where it is not all.
    pub cut: Option<Cut>,
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The image's size with its margins.
    pub whole: ImageSize,
    pub region: Region,
}

/// Where a result goes.
#[derive(Clone, Debug)]
pub struct Paste {
    pub original: Rgb8,
    /// Of the original's size.
    pub mask: Gray8,
    /// The part of the original that the result shows.
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

impl ConditioningInstructor {
    /// The image of a request at the working size, with its mask.
    ///
    /// # Errors
    /// `image_decode_failed`, `cancelled`, `deadline_exceeded`.
    pub fn canvas(&self, options: &InitImageOptions, size: ImageSize, ctx: &Context) -> Result<InitImage> {
        let original = options.image.decode()?.grown(options.margins)?;
        let fit = |image: &Rgb8, mode| ctx.perform(&Fit, FitTask { image, size, mode });
        let Some(asked) = &options.mask else {
            return Ok(InitImage { image: fit(&original, options.resize)?, mask: None, paste: None, cut: None });
        };
        let mask = self.mask(asked, options, ctx)?;
        let whole = Region { left: 0, top: 0, width: original.width, height: original.height };
        let region = match asked.only_masked {
            Some(padding) => region(&mask, padding, size),
            None => whole,
        };
        let (mut image, working_mask) = if asked.only_masked.is_none() {
            (fit(&original, options.resize)?, fit(&mask.to_rgb(), options.resize)?.to_gray())
        } else {
            // The region has the proportions of the work, except where the image's border cut it.
            let part = |image: &Rgb8| fit(&image.part(region)?, ResizeMode::Fill);
            (part(&original)?, part(&mask.to_rgb())?.to_gray())
        };
        if asked.fill == InpaintingFill::Fill {
            image = ctx.perform(&Fill, FillTask { image: &image, mask: &working_mask })?;
        }
        let paste = match (asked.paste, asked.only_masked) {
            (false, _) => None,
            (true, Some(_)) => Some(Paste { original, mask, region }),
            // The result has the working size, and so has what shows through.
            (true, None) => {
                let original = fit(&original, options.resize)?;
                let region = Region { left: 0, top: 0, width: size.width, height: size.height };
                Some(Paste { original, mask: working_mask.clone(), region })
            }
        };
        let cut = asked.only_masked.map(|_| Cut { whole: options.size(), region });
        Ok(InitImage { image, mask: Some(working_mask), paste, cut })
    }

    /// The mask at the size of the image with its margins.
    fn mask(&self, asked: &MaskOptions, options: &InitImageOptions, ctx: &Context) -> Result<Gray8> {
        let (width, height) = (options.image.width, options.image.height);
        let inner = match &asked.image {
            Some(file) => {
                let size = ImageSize { width, height };
                let image = file.decode()?;
                let mut mask = ctx.perform(&Fit, FitTask { image: &image, size, mode: ResizeMode::Stretch })?.to_gray();
                if asked.invert {
                    mask.data.iter_mut().for_each(|value| *value = 255 - *value);
                }
                mask
            }
            None => Gray8 { width, height, data: vec![0; width * height] },
        };
        let mask = inner.framed(options.margins, 255);
        if asked.blur > 0.0 { ctx.perform(&Blur, BlurTask { mask: &mask, sigma: asked.blur }) } else { Ok(mask) }
    }
}
