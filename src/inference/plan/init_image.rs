//! Decides what happens to the image that a request brings: its size, its mask, and at which step the run starts.

use crate::conditioning::init_image::{InitImageOptions, Margins, MaskOptions};
use crate::error::{Error, Result};
use crate::image::source::ImageSource;
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface::{GenerateRequest, VaeSample};
use crate::inference::plan::InitImagePlan;
use crate::inference::plan::build::within;
use crate::scheduler::plan::SamplingPlan;
use crate::units::ImageSize;

/// As AUTOMATIC1111 has them.
const DENOISING_STRENGTH: f64 = 0.75;
const MASK_BLUR: f64 = 4.0;
const ONLY_MASKED_PADDING: i64 = 32;
/// Largest blur and padding in pixels.
const MOST_BLUR: f64 = 256.0;
const MOST_PADDING: i64 = 4096;

impl InferenceInstructor {
    /// The image of a request, if it brings one. Says what it decided in `parameters`.
    ///
    /// # Errors
    /// Those of reading the image; `invalid_parameter` for what cannot be done with it.
    pub(crate) fn editing(
        &self,
        request: &GenerateRequest,
        parameters: &mut GenerateRequest,
    ) -> Result<Option<InitImagePlan>> {
        let Some(source) = &request.init_image else {
            return alone(request).map(|()| None);
        };
        let image = source.read(&self.conditioning.roots, "init_image")?;
        let margins = margins(request.extend)?;
        let pixels = (image.width + margins[0] + margins[2]) as u64 * (image.height + margins[1] + margins[3]) as u64;
        if pixels > ImageSource::MAX_PIXELS {
            let most = ImageSource::MAX_PIXELS;
            return Err(Error::invalid("extend", format!("must leave the image at most {most} pixels, got {pixels}")));
        }
        let masked = request.mask.is_some() || request.extend.is_some();
        let mask = if masked { Some(self.mask(request, parameters)?) } else { unmasked(request).map(|()| None)? };
        if request.denoising_start.is_some() && request.denoising_strength.is_some() {
            return Err(Error::invalid("denoising_strength", "and `denoising_start` must not both be given"));
        }
        let strength =
            within("denoising_strength", request.denoising_strength.unwrap_or(DENOISING_STRENGTH), 0.0, 1.0)?;
        let sampled = request.init_sample.unwrap_or_default();
        let resize = request.resize_mode.unwrap_or_default();
        parameters.init_sample = Some(sampled);
        parameters.resize_mode = Some(resize);
        parameters.denoising_strength = request.denoising_start.is_none().then_some(strength);
        Ok(Some(InitImagePlan {
            from_noise: masked && strength == 1.0 && request.denoising_start.is_none(),
            beside: false,
            adds_noise: request.denoising_start.is_none(),
            canvas: InitImageOptions { image, margins, resize, mask },
            sampled: sampled == VaeSample::Sample,
            soft: masked && request.soft_mask.unwrap_or(false),
        }))
    }

    fn mask(&self, request: &GenerateRequest, parameters: &mut GenerateRequest) -> Result<MaskOptions> {
        let image = request.mask.as_ref().map(|mask| mask.read(&self.conditioning.roots, "mask")).transpose()?;
        let blur = within("mask_blur", request.mask_blur.unwrap_or(MASK_BLUR), 0.0, MOST_BLUR)?;
        if request.mask.is_none() && request.mask_invert.is_some() {
            return Err(Error::invalid("mask_invert", "needs a `mask`"));
        }
        let invert = request.mask_invert.unwrap_or(false);
        let only_masked = request.inpaint_full_res.unwrap_or(false);
        if !only_masked && request.inpaint_full_res_padding.is_some() {
            return Err(Error::invalid("inpaint_full_res_padding", "needs `\"inpaint_full_res\": true`"));
        }
        let padding = request.inpaint_full_res_padding.unwrap_or(ONLY_MASKED_PADDING);
        if !(0..=MOST_PADDING).contains(&padding) {
            let message = format!("must be 0 to {MOST_PADDING}, got {padding}");
            return Err(Error::invalid("inpaint_full_res_padding", message));
        }
        let fill = request.inpainting_fill.unwrap_or_default();
        let paste = request.paste_back.unwrap_or(true);
        parameters.mask_blur = Some(blur);
        parameters.mask_invert = request.mask.as_ref().map(|_| invert);
        parameters.inpaint_full_res = Some(only_masked);
        parameters.inpaint_full_res_padding = only_masked.then_some(padding);
        parameters.inpainting_fill = Some(fill);
        parameters.paste_back = Some(paste);
        parameters.soft_mask = Some(request.soft_mask.unwrap_or(false));
        let only_masked = only_masked.then_some(padding.unsigned_abs() as usize);
        Ok(MaskOptions { image, invert, blur, only_masked, fill, paste })
    }

    /// The size of the work where a request names none: the image's, cut to a multiple of 8; that of the model where
    /// only what is masked is worked on.
    pub(crate) fn size_of(&self, editing: Option<&InitImagePlan>, model: ImageSize) -> ImageSize {
        let Some(editing) = editing else { return model };
        if editing.canvas.mask.as_ref().is_some_and(|mask| mask.only_masked.is_some()) {
            return model;
        }
        let side = |pixels: usize| pixels / 8 * 8;
        let size = editing.canvas.size();
        ImageSize { width: side(size.width), height: side(size.height) }
    }
}

/// The part of a plan that is walked, by the request's strength or its `denoising_start` and `denoising_end`.
///
/// # Errors
/// `invalid_parameter` where no step is left.
pub(crate) fn cut(
    request: &GenerateRequest,
    editing: Option<&InitImagePlan>,
    sampling: SamplingPlan,
) -> Result<SamplingPlan> {
    let steps = sampling.trajectory.len();
    let start = match (editing, request.denoising_start) {
        (_, Some(share)) => sampling.from_share(within("denoising_start", share, 0.0, 1.0)?),
        (Some(editing), None) if !editing.beside => {
            by_strength(steps, request.denoising_strength.unwrap_or(DENOISING_STRENGTH))
        }
        (_, None) => 0,
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

/// The first step of a run of `strength`, of which int(steps · strength) are walked.
pub(crate) fn by_strength(steps: usize, strength: f64) -> usize {
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

/// Without an image, nothing may be asked of one.
fn alone(request: &GenerateRequest) -> Result<()> {
    let asked = [
        ("mask", request.mask.is_some()),
        ("extend", request.extend.is_some()),
        ("resize_mode", request.resize_mode.is_some()),
        ("init_sample", request.init_sample.is_some()),
        ("denoising_start", request.denoising_start.is_some()),
        ("denoising_strength", request.denoising_strength.is_some() && !request.enable_hr.unwrap_or(false)),
    ];
    if let Some((field, _)) = asked.iter().find(|(_, given)| *given) {
        return Err(Error::invalid(*field, "needs an `init_image`"));
    }
    unmasked(request)
}

/// Without a mask, nothing may be asked of one.
fn unmasked(request: &GenerateRequest) -> Result<()> {
    let asked = [
        ("mask_blur", request.mask_blur.is_some()),
        ("mask_invert", request.mask_invert.is_some()),
        ("soft_mask", request.soft_mask.is_some()),
        ("inpainting_fill", request.inpainting_fill.is_some()),
        ("inpaint_full_res", request.inpaint_full_res.is_some()),
        ("inpaint_full_res_padding", request.inpaint_full_res_padding.is_some()),
        ("paste_back", request.paste_back.is_some()),
    ];
    match asked.iter().find(|(_, given)| *given) {
        Some((field, _)) => Err(Error::invalid(*field, "needs a `mask` or `extend`")),
        None => Ok(()),
    }
}
