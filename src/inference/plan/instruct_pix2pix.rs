//! Requests for instruct-pix2pix models (Brooks et al. 2022, <https://arxiv.org/abs/2211.09800>), which start from noise
//! and take the image's latents as further channels.

use crate::error::{Error, Result};
use crate::inference::plan::InitImagePlan;
use crate::inference::plan::limits::refuse_given;
use crate::inference::request::generate::GenerateRequest;
use crate::model::checkpoint::Checkpoint;

/// Sets `init_image` up for instruct-pix2pix, if `checkpoint` is such a model.
///
/// # Errors
/// `invalid_parameter` without an image, and for options that have no meaning; `unsupported_feature` for options that
/// change only a part of the image.
pub(crate) fn concatenate(
    request: &GenerateRequest,
    checkpoint: &Checkpoint,
    init_image: Option<&mut InitImagePlan>,
) -> Result<()> {
    if !checkpoint.family.edits {
        return Ok(());
    }
    let name = &checkpoint.name;
    let Some(init_image) = init_image else {
        return Err(Error::invalid("init_image", format!("is missing: `{name}` is a model that edits an image")));
    };
    let without_meaning = [
        ("denoising_strength", request.denoising_strength.is_some()),
        ("denoising_start", request.denoising_start.is_some()),
        ("init_sample", request.init_sample.is_some()),
    ];
    let message = format!("must be left out for `{name}`, which starts from noise and sees the whole image");
    refuse_given(&without_meaning, &message)?;
    let unsupported = [
        ("mask", request.mask.is_some()),
        ("extend", request.extend.is_some()),
        ("enable_hr", request.enable_hr.unwrap_or(false)),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, given)| *given) {
        return Err(Error::UnsupportedFeature {
            what: format!("`{field}` with a model that edits an image"),
            hint: Some(format!("leave `{field}` out, or name another model")),
            field: Some((*field).to_owned()),
        });
    }
    init_image.concat = true;
    init_image.strength = None;
    Ok(())
}
