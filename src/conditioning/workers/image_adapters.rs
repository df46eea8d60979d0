//! Runs image adapters: images to features of a T2I-Adapter, and to tokens of an IP-Adapter.
//!
//! Legend: `S` side of an image encoder's input, `H` `W` rows and columns, `C` channels, `T` tokens, `D` their width.

use candle_core::{DType, Device, Result as CandleResult, Tensor};

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::{Result, StageContext};
use crate::image::pixels::{Region, Rgb8};
use crate::image::resample::Filter;
use crate::image::source::ImageFile;
use crate::layers::Worker;
use crate::model::networks::clip_vision::{ClipVision, Seen};
use crate::model::networks::ip_adapter::IpAdapter;
use crate::model::networks::t2i_adapter::T2iAdapter;
use crate::units::ImageSize;

const STAGE: &str = "image encoder";
/// Mean and standard deviation of CLIP's training images, red, green, blue.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// Runs a T2I-Adapter.
pub(crate) struct ExtractFeatures;

pub(crate) struct ExtractFeaturesTask<'a> {
    pub(crate) network: &'a T2iAdapter,
    pub(crate) image: &'a Rgb8,
    /// Size of the generated image.
    pub(crate) size: ImageSize,
    /// Channels of the adapter's input: 3, or 1 for grey.
    pub(crate) channels: usize,
    pub(crate) placement: &'a Placement,
}

impl Worker<ExtractFeaturesTask<'_>> for ExtractFeatures {
    /// One for each block, `[1, H, W, C]` in the compute dtype.
    type Output = Vec<Tensor>;

    fn run(&self, task: ExtractFeaturesTask<'_>, ctx: &Context) -> Result<Vec<Tensor>> {
        let ExtractFeaturesTask { network, image, size, channels, placement } = task;
        let ImageSize { width, height } = size;
        // Grey before it is scaled, as callers of the reference do it.
        let image = if channels == 1 { image.to_gray().to_rgb() } else { image.clone() };
        let same = (image.width, image.height) == (width, height);
        let image = if same { image } else { image.resized(width, height, Filter::Lanczos)? };
        let step = if channels == 1 { 3 } else { 1 };
        let values: Vec<f32> = image.data.iter().step_by(step).map(|&byte| f32::from(byte) / 255.0).collect();
        let picture = Tensor::from_vec(values, (1, height, width, channels), &Device::Cpu)
            .and_then(|picture| picture.to_device(&placement.device)?.to_dtype(placement.compute.tensor()))
            .stage(STAGE)?;
        network.forward(&picture, &|| ctx.checkpoint())
    }
}

/// Runs an IP-Adapter.
pub(crate) struct EncodeImagePrompt;

pub(crate) struct EncodeImagePromptTask<'a> {
    pub(crate) network: &'a IpAdapter,
    pub(crate) encoder: &'a ClipVision,
    /// At least one. They are decoded one by one to save memory.
    pub(crate) images: &'a [ImageFile],
    /// True if tokens for the negative prompt precede those of the images.
    pub(crate) guided: bool,
    pub(crate) placement: &'a Placement,
}

impl Worker<EncodeImagePromptTask<'_>> for EncodeImagePrompt {
    /// `[1, T, D]`, or `[2, T, D]` with guidance: the concatenated tokens of all images.
    type Output = Tensor;

    fn run(&self, task: EncodeImagePromptTask<'_>, ctx: &Context) -> Result<Tensor> {
        let EncodeImagePromptTask { network, encoder, images, guided, placement } = task;
        let (wanted, dtype) = (network.wants(), placement.compute.tensor());
        let check = || ctx.checkpoint();
        let mut rows = Vec::new();
        let mut shown = Vec::with_capacity(images.len());
        for image in images {
            check()?;
            let pixels = clip_pixels(&image.decode()?, encoder.image_size())?;
            let pixels = pixels.to_device(&placement.device).and_then(|pixels| pixels.to_dtype(dtype)).stage(STAGE)?;
            if guided && rows.is_empty() {
                // No image: an embedding of zeros, or for patches the states of an image of zeros.
                let nothing = match wanted {
                    Seen::Whole => Tensor::zeros((1, network.inputs()), dtype, &placement.device).stage(STAGE)?,
                    Seen::Patches => encoder.forward(&pixels.zeros_like().stage(STAGE)?, wanted, &check)?,
                };
                let nothing = network.project(&nothing)?;
                rows.push(Tensor::cat(&vec![nothing; images.len()], 1).stage(STAGE)?);
            }
            shown.push(network.project(&encoder.forward(&pixels, wanted, &check)?)?);
        }
        let mut join = || -> CandleResult<Tensor> {
            rows.push(Tensor::cat(&shown, 1)?);
            Tensor::cat(&rows, 0)
        };
        join().stage(STAGE)
    }
}

/// An image as CLIP's image encoders take it, `[1, S, S, 3]`, f32: its shorter side resized to `side` pixels, cropped at
/// the centre, and normalised, as transformers' `CLIPImageProcessor` does with Pillow.
///
/// # Errors
/// Those of the resizing; `internal` for an empty image.
pub fn clip_pixels(image: &Rgb8, side: usize) -> Result<Tensor> {
    let (width, height) = (image.width.max(1), image.height.max(1));
    let (width, height) = if width <= height { (side, side * height / width) } else { (side * width / height, side) };
    let same = (image.width, image.height) == (width, height);
    let scaled = if same { image.clone() } else { image.resized(width, height, Filter::Bicubic)? };
    let region = Region { left: (width - side) / 2, top: (height - side) / 2, width: side, height: side };
    let normal = |(&byte, channel): (&u8, usize)| {
        #[expect(clippy::cast_possible_truncation, reason = "the reference rounds to f32 here")]
        let value = (f64::from(byte) * (1.0 / 255.0)) as f32;
        let (mean, deviation) = (MEAN.get(channel).unwrap_or(&0.0), DEVIATION.get(channel).unwrap_or(&1.0));
        (value - mean) / deviation
    };
    let values: Vec<f32> = scaled.part(region)?.data.iter().zip([0, 1, 2].into_iter().cycle()).map(normal).collect();
    Tensor::from_vec(values, (1, side, side, 3), &Device::Cpu).and_then(|x| x.to_dtype(DType::F32)).stage(STAGE)
}
