//! Models that edit an image as a sentence says (instruct-pix2pix, Brooks et al. 2022,
//! <https://arxiv.org/abs/2211.09800>): the run starts from noise, and the network sees the image beside its latents.

use candle_core::Tensor;

use crate::conditioning::init_image::InitImage;
use crate::error::{Error, Result};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface::GenerateRequest;
use crate::inference::managers::pipeline::{Hands, Start};
use crate::inference::plan::{GenerationPlan, InitImagePlan};
use crate::inference::workers::latents::Masking;
use crate::model::checkpoint::Checkpoint;
use crate::noise::NoiseSource;

/// Says that the image goes beside the latents, if the model is such a one, and refuses what then has no meaning.
///
/// # Errors
/// `invalid_parameter` without an image; `unsupported_feature` for what changes only part of it.
pub(crate) fn rewrites(
    request: &GenerateRequest,
    checkpoint: &Checkpoint,
    parameters: &mut GenerateRequest,
    editing: Option<&mut InitImagePlan>,
) -> Result<()> {
    if !checkpoint.family.edits {
        return Ok(());
    }
    let name = &checkpoint.name;
    let Some(editing) = editing else {
        return Err(Error::invalid("init_image", format!("is missing: `{name}` is a model that edits an image")));
    };
    let without_meaning = [
        ("denoising_strength", request.denoising_strength.is_some()),
        ("denoising_start", request.denoising_start.is_some()),
        ("init_sample", request.init_sample.is_some()),
    ];
    if let Some((field, _)) = without_meaning.iter().find(|(_, given)| *given) {
        let message = format!("must be left out for `{name}`, which starts from noise and sees the whole image");
        return Err(Error::invalid(*field, message));
    }
    let absent = [
        ("mask", request.mask.is_some()),
        ("extend", request.extend.is_some()),
        ("enable_hr", request.enable_hr.unwrap_or(false)),
    ];
    if let Some((field, _)) = absent.iter().find(|(_, given)| *given) {
        return Err(Error::UnsupportedFeature {
            what: format!("`{field}` with a model that edits an image"),
            hint: Some(format!("leave `{field}` out, or name another model")),
            field: Some((*field).to_owned()),
        });
    }
    editing.beside = true;
    parameters.denoising_strength = None;
    parameters.init_sample = None;
    Ok(())
}

impl InferenceInstructor {
    /// Noise, and the image's most likely latents beside it.
    ///
    /// # Errors
    /// Those of encoding the image.
    pub(crate) fn beside(
        &self,
        plan: &GenerationPlan,
        canvas: &InitImage,
        noise: &mut NoiseSource,
        (placement, resources, ctx): Hands<'_>,
    ) -> Result<Start<Masking>> {
        let latents = self.encoded(plan, &canvas.image, None, (placement, resources, ctx))?;
        let seen = match plan.checkpoint.scales_image {
            true => latents,
            false => plan.checkpoint.vae.from_model(&latents)?,
        };
        let x = (noise.initial()? * plan.sampling.init_scale)?;
        let (batch, height, width, _) = seen.dims4()?;
        let mask = Tensor::ones((batch, height, width, 1), seen.dtype(), seen.device())?;
        Ok(Start { x, masking: Some(Masking { mask, outside: None, beside: Some(seen) }) })
    }
}
