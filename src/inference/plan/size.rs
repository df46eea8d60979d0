//! Size of an image, and SDXL's size conditioning.

use crate::error::{Error, Result};
use crate::inference::interface::Settings;
use crate::inference::plan::InitImagePlan;
use crate::inference::plan::limits::within;
use crate::inference::request::generate::GenerateRequest;
use crate::inference::workers::prepare::TimeIds;
use crate::model::checkpoint::Checkpoint;
use crate::units::ImageSize;

/// The refiner's aesthetic scores of a positive and a negative prompt.
const AESTHETIC: [f64; 2] = [6.0, 2.5];

/// The size of the first pass.
///
/// # Errors
/// `invalid_parameter` for sides that are no multiple of 8, or beyond the configured limit.
pub(crate) fn size(
    request: &GenerateRequest,
    init_image: Option<&InitImagePlan>,
    checkpoint: &Checkpoint,
    settings: &Settings,
) -> Result<ImageSize> {
    let default = default_size(init_image, checkpoint.default_size());
    let max = i64::from(settings.max_side);
    let side = |field: &str, options: Option<i64>, default: usize| -> Result<usize> {
        let side = options.unwrap_or(default as i64);
        match usize::try_from(side) {
            Ok(pixels) if side % 8 == 0 && (64..=max).contains(&side) => Ok(pixels),
            _ => Err(Error::invalid(field, format!("must be a multiple of 8 from 64 to {max}, got {side}"))),
        }
    };
    Ok(ImageSize {
        width: side("width", request.width, default.width)?,
        height: side("height", request.height, default.height)?,
    })
}

/// The init image's size, cut to multiples of 8; the model's own size without an image, or if only the masked region is
/// repainted.
fn default_size(init_image: Option<&InitImagePlan>, model: ImageSize) -> ImageSize {
    let Some(InitImagePlan { options, .. }) = init_image else { return model };
    if options.mask.as_ref().is_some_and(|mask| mask.only_masked.is_some()) {
        return model;
    }
    let side = |pixels: usize| pixels / 8 * 8;
    let size = options.size();
    ImageSize { width: side(size.width), height: side(size.height) }
}

/// SDXL's size conditioning. Diffusers' rule: the negative prompt shares the prompt's numbers unless the request gives it
/// its own, and then its crop defaults to 0, 0.
///
/// # Errors
/// `invalid_parameter` for numbers out of range.
pub(crate) fn time_ids(request: &GenerateRequest, size: ImageSize, checkpoint: &Checkpoint) -> Result<TimeIds> {
    let image = [size.height as f64, size.width as f64];
    let pair = |field: &str, options: Option<[i64; 2]>, default: [f64; 2]| -> Result<[f64; 2]> {
        let Some(given) = options else { return Ok(default) };
        if given.iter().any(|side| !(0..=65536).contains(side)) {
            return Err(Error::invalid(field, format!("must be two numbers of 0 to 65536, got {given:?}")));
        }
        Ok(given.map(|side| side as f64))
    };
    let original = pair("original_size", request.original_size, image)?;
    let crop = pair("crops_coords_top_left", request.crops_coords_top_left, [0.0; 2])?;
    let target = pair("target_size", request.target_size, image)?;
    let own = request.negative_original_size.is_some()
        || request.negative_crops_coords_top_left.is_some()
        || request.negative_target_size.is_some();
    let negative_original = pair("negative_original_size", request.negative_original_size, original)?;
    let negative_crop = pair(
        "negative_crops_coords_top_left",
        request.negative_crops_coords_top_left,
        if own { [0.0; 2] } else { crop },
    )?;
    let negative_target = pair("negative_target_size", request.negative_target_size, target)?;
    let aesthetic = [
        within("aesthetic_score", request.aesthetic_score.unwrap_or(AESTHETIC[0]), 0.0, 10.0)?,
        within("negative_aesthetic_score", request.negative_aesthetic_score.unwrap_or(AESTHETIC[1]), 0.0, 10.0)?,
    ];
    let ids = |original: [f64; 2], crop: [f64; 2], target: [f64; 2], aesthetic: f64| -> Vec<f64> {
        if wants_aesthetic_score(checkpoint) {
            vec![original[0], original[1], crop[0], crop[1], aesthetic]
        } else {
            [original, crop, target].concat()
        }
    };
    Ok(TimeIds {
        positive: ids(original, crop, target, aesthetic[0]),
        negative: ids(negative_original, negative_crop, negative_target, aesthetic[1]),
    })
}

/// True for UNets like the refiner's, which take five numbers with the pooled text; the base takes six.
fn wants_aesthetic_score(checkpoint: &Checkpoint) -> bool {
    checkpoint.text_encoder_2.projection_dim.and_then(|pooled| checkpoint.unet.time_ids(pooled)) == Some(5)
}
