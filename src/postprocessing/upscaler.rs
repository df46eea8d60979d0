//! The contract of an upscaler, which enlarges either latents or pixels.
//!
//! An upscaler is one file in `workers/upscale/` and one line in [`crate::postprocessing::UPSCALERS`].

use candle_core::Tensor;

use crate::image::pixels::Rgb8;
use crate::layers::Worker;

pub struct Upscaler {
    /// AUTOMATIC1111's name.
    pub label: &'static str,
    pub method: UpscaleMethod,
}

#[derive(Clone, Copy)]
pub enum UpscaleMethod {
    /// Enlarges latents, `[B, H, W, C]`, f32, without decoding them.
    Latents(&'static LatentUpscaler),
    /// Enlarges the decoded image.
    Pixels(&'static PixelUpscaler),
}

pub type LatentUpscaler = dyn for<'a> Worker<UpscaleTask<'a, Tensor>, Output = Tensor>;

pub type PixelUpscaler = dyn for<'a> Worker<UpscaleTask<'a, Rgb8>, Output = Rgb8>;

pub struct UpscaleTask<'a, Image> {
    pub image: &'a Image,
    /// The new width in pixels of `image`: for latents an eighth of the picture's.
    pub width: usize,
    pub height: usize,
}
