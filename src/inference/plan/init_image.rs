//! The image that a request brings: its mask, its strength, and the part of the schedule that it is denoised over.

use crate::conditioning::init_image::{InitImageOptions, Margins, MaskOptions};
use crate::error::{Error, Result};
use crate::image::source::ImageSource;
use crate::inference::plan::InitImagePlan;
use crate::inference::plan::limits::{refuse_given, within};
use crate::inference::request::generate::{GenerateRequest, VaeSample};
use crate::roots::Roots;
use crate::scheduler::plan::SamplingPlan;

/// AUTOMATIC1111's defaults.
const DENOISING_STRENGTH: f64 = 0.75;
const MASK_BLUR: f64 = 4.0;
const ONLY_MASKED_PADDING: i64 = 32;
/// Largest blur and padding in pixels.
const MAX_BLUR: f64 = 256.0;
const MAX_PADDING: i64 = 4096;

/// The request's image, if it brings one.
///
/// # Errors
/// Those of reading the image; `invalid_parameter` for options that contradict each other or need an image.
pub(crate) fn init_image(request: &GenerateRequest, roots: &Roots) -> Result<Option<InitImagePlan>> {
    let Some(source) = &request.init_image else {
        return refuse_without_image(request).map(|()| None);
    };
    let image = source.read(roots, "init_image")?;
    let margins = margins(request.extend)?;
    let pixels = (image.width + margins[0] + margins[2]) as u64 * (image.height + margins[1] + margins[3]) as u64;
    if pixels > ImageSource::MAX_PIXELS {
        let most = ImageSource::MAX_PIXELS;
        return Err(Error::invalid("extend", format!("must leave the image at most {most} pixels, got {pixels}")));
    }
    let masked = request.mask.is_some() || request.extend.is_some();
    let mask = match masked {
        true => Some(mask(request, roots)?),
        false => refuse_without_mask(request).map(|()| None)?,
    };
    if request.denoising_start.is_some() && request.denoising_strength.is_some() {
        return Err(Error::invalid("denoising_strength", "and `denoising_start` must not both be given"));
    }
    let strength = within("denoising_strength", request.denoising_strength.unwrap_or(DENOISING_STRENGTH), 0.0, 1.0)?;
    let has_strength = request.denoising_start.is_none();
    Ok(Some(InitImagePlan {
        strength: has_strength.then_some(strength),
        from_noise: masked && strength == 1.0 && has_strength,
        concat: false,
        adds_noise: has_strength,
        options: InitImageOptions { image, margins, resize: request.resize_mode.unwrap_or_default(), mask },
        sampled: request.init_sample.unwrap_or_default() == VaeSample::Sample,
        soft_mask: masked && request.soft_mask.unwrap_or(false),
    }))
}

fn mask(request: &GenerateRequest, roots: &Roots) -> Result<MaskOptions> {
    let image = request.mask.as_ref().map(|mask| mask.read(roots, "mask")).transpose()?;
    let blur = within("mask_blur", request.mask_blur.unwrap_or(MASK_BLUR), 0.0, MAX_BLUR)?;
    if request.mask.is_none() && request.mask_invert.is_some() {
        return Err(Error::invalid("mask_invert", "needs a `mask`"));
    }
    let only_masked = request.inpaint_full_res.unwrap_or(false);
    if !only_masked && request.inpaint_full_res_padding.is_some() {
        return Err(Error::invalid("inpaint_full_res_padding", "needs `\"inpaint_full_res\": true`"));
    }
    let padding = request.inpaint_full_res_padding.unwrap_or(ONLY_MASKED_PADDING);
    if !(0..=MAX_PADDING).contains(&padding) {
        let message = format!("must be 0 to {MAX_PADDING}, got {padding}");
        return Err(Error::invalid("inpaint_full_res_padding", message));
    }
    Ok(MaskOptions {
        image,
        invert: request.mask_invert.unwrap_or(false),
        blur,
        only_masked: only_masked.then_some(padding.unsigned_abs() as usize),
        fill: request.inpainting_fill.unwrap_or_default(),
        paste: request.paste_back.unwrap_or(true),
    })
}

/// The part of the schedule that the first pass takes, by strength or by `denoising_start` and `denoising_end`.
///
/// # Errors
/// `invalid_parameter` if no step is left.
pub(crate) fn cut(
    request: &GenerateRequest,
    init_image: Option<&InitImagePlan>,
    sampling: SamplingPlan,
) -> Result<SamplingPlan> {
    let steps = sampling.trajectory.len();
    let strength = init_image.and_then(|init_image| init_image.strength);
    let start = match (request.denoising_start, strength) {
        (Some(share), _) => sampling.from_share(within("denoising_start", share, 0.0, 1.0)?),
        (None, Some(strength)) => first_step(steps, strength),
        (None, None) => 0,
    };
    let end = match request.denoising_end {
        Some(share) => sampling.until_share(within("denoising_end", share, 0.0, 1.0)?),
        None => steps,
    };
    if start >= end {
        let field = match (request.denoising_start, request.denoising_end) {
            (Some(_), _) => "denoising_start",
            (None, Some(_)) => "denoising_end",
            (None, None) => "denoising_strength",
        };
        return Err(Error::invalid(field, format!("must leave at least one of {steps} steps")));
    }
    Ok(sampling.between(start..end))
}

/// The first step at `strength`: int(steps · strength) steps are taken.
pub(crate) fn first_step(steps: usize, strength: f64) -> usize {
    steps - ((steps as f64 * strength) as usize).min(steps)
}

fn margins(options: Option<Margins>) -> Result<[usize; 4]> {
    let Some(Margins { left, top, right, bottom }) = options else { return Ok([0; 4]) };
    let mut sides = [0; 4];
    let named = [("left", left), ("top", top), ("right", right), ("bottom", bottom)];
    for (side, (name, pixels)) in sides.iter_mut().zip(named) {
        *side = usize::try_from(pixels).ok().filter(|side| *side <= 4096 && side % 8 == 0).ok_or_else(|| {
            Error::invalid(format!("extend.{name}"), format!("must be a multiple of 8 from 0 to 4096, got {pixels}"))
        })?;
    }
    if sides == [0; 4] {
        return Err(Error::invalid("extend", "must name at least one side"));
    }
    Ok(sides)
}

/// Refuses options that need an `init_image`.
fn refuse_without_image(request: &GenerateRequest) -> Result<()> {
    let given = [
        ("mask", request.mask.is_some()),
        ("extend", request.extend.is_some()),
        ("resize_mode", request.resize_mode.is_some()),
        ("init_sample", request.init_sample.is_some()),
        ("denoising_start", request.denoising_start.is_some()),
        ("denoising_strength", request.denoising_strength.is_some() && !request.enable_hr.unwrap_or(false)),
    ];
    refuse_given(&given, "needs an `init_image`")?;
    refuse_without_mask(request)
}

/// Refuses options that need a mask.
fn refuse_without_mask(request: &GenerateRequest) -> Result<()> {
    let given = [
        ("mask_blur", request.mask_blur.is_some()),
        ("mask_invert", request.mask_invert.is_some()),
        ("soft_mask", request.soft_mask.is_some()),
        ("inpainting_fill", request.inpainting_fill.is_some()),
        ("inpaint_full_res", request.inpaint_full_res.is_some()),
        ("inpaint_full_res_padding", request.inpaint_full_res_padding.is_some()),
        ("paste_back", request.paste_back.is_some()),
    ];
    refuse_given(&given, "needs a `mask` or `extend`")
}
