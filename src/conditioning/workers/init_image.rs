//! Prepares an init image and its mask for the VAE.
//!
//! In AUTOMATIC1111's order: the image grows by its margins, the mask is inverted and blurred, the region around the mask
//! is cut out for "only masked", and everything is resized to the working size.

use crate::conditioning::init_image::{
    Cut, InitImage, InitImageOptions, InpaintingFill, MaskOptions, Paste, ResizeMode,
};
use crate::conditioning::workers::inpaint_fill::{FillMasked, FillMaskedTask};
use crate::conditioning::workers::mask::{BlurMask, BlurMaskTask, masked_region};
use crate::conditioning::workers::resize::{Resize, ResizeTask};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Region, Rgb8};
use crate::layers::Worker;
use crate::units::ImageSize;

pub struct PrepareInitImage;

pub struct PrepareInitImageTask<'a> {
    pub options: &'a InitImageOptions,
    /// The working size.
    pub size: ImageSize,
}

impl Worker<PrepareInitImageTask<'_>> for PrepareInitImage {
    type Output = InitImage;

    /// # Errors
    /// `image_decode_failed`, `cancelled`, `deadline_exceeded`.
    fn run(&self, task: PrepareInitImageTask<'_>, ctx: &Context) -> Result<InitImage> {
        let PrepareInitImageTask { options, size } = task;
        let original = options.image.decode()?.grown(options.margins)?;
        let resized = |image: &Rgb8, mode| ctx.perform(&Resize, ResizeTask { image, size, mode });
        let Some(mask_options) = &options.mask else {
            return Ok(InitImage { image: resized(&original, options.resize)?, mask: None, paste: None, cut: None });
        };
        let mask = prepare_mask(mask_options, options, ctx)?;
        let whole = Region { left: 0, top: 0, width: original.width, height: original.height };
        let only_masked = mask_options.only_masked;
        let region = only_masked.map_or(whole, |padding| masked_region(&mask, padding, size));
        let (mut image, working_mask) = if only_masked.is_none() {
            (resized(&original, options.resize)?, resized(&mask.to_rgb(), options.resize)?.to_gray())
        } else {
            // The region has the working proportions, except where the image's border cut it.
            let part = |image: &Rgb8| resized(&image.part(region)?, ResizeMode::Fill);
            (part(&original)?, part(&mask.to_rgb())?.to_gray())
        };
        if mask_options.fill == InpaintingFill::Fill {
            image = ctx.perform(&FillMasked, FillMaskedTask { image: &image, mask: &working_mask })?;
        }
        let paste = match (mask_options.paste, only_masked) {
            (false, _) => None,
            (true, Some(_)) => Some(Paste { original, mask, region }),
            (true, None) => {
                let original = resized(&original, options.resize)?;
                let region = Region { left: 0, top: 0, width: size.width, height: size.height };
                Some(Paste { original, mask: working_mask.clone(), region })
            }
        };
        let cut = only_masked.map(|_| Cut { whole: options.size(), region });
        Ok(InitImage { image, mask: Some(working_mask), paste, cut })
    }
}

/// The mask at the size of the image with its margins.
fn prepare_mask(mask: &MaskOptions, options: &InitImageOptions, ctx: &Context) -> Result<Gray8> {
    let (width, height) = (options.image.width, options.image.height);
    let inner = match &mask.image {
        Some(file) => {
            let image = file.decode()?;
            let task = ResizeTask { image: &image, size: ImageSize { width, height }, mode: ResizeMode::Stretch };
            let mut gray = ctx.perform(&Resize, task)?.to_gray();
            if mask.invert {
                gray.data.iter_mut().for_each(|value| *value = 255 - *value);
            }
            gray
        }
        None => Gray8 { width, height, data: vec![0; width * height] },
    };
    let framed = inner.framed(options.margins, 255);
    match mask.blur > 0.0 {
        true => ctx.perform(&BlurMask, BlurMaskTask { mask: &framed, sigma: mask.blur }),
        false => Ok(framed),
    }
}
