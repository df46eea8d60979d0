//! The first sample of a pass: noise, the request's image, or latents of the pass before.
//!
//! Noise is drawn in the reference's order: for the encoded image, for the start, and for the encoded masked image, which
//! the reference encodes even for a UNet that does not take it.

use candle_core::Tensor;

use crate::conditioning::init_image::{InitImage, InpaintingFill};
use crate::device::instructor::{DeviceInstructor, Placement};
use crate::error::{Error, Result};
use crate::image::pixels::{Gray8, Rgb8};
use crate::inference::managers::Session;
use crate::inference::managers::pipeline::vae::{decode, encode};
use crate::inference::plan::{GenerationPlan, InitImagePlan, PassEntry, PassPlan};
use crate::inference::workers::latents::{Masking, Outside, latent_mask, masked_image, noised};
use crate::noise::{NoiseSource, Seed};
use crate::postprocessing::upscaler::UpscaleTask;
use crate::units::ImageSize;

/// One image's pass that begins.
pub(super) struct StartTask<'a> {
    pub(super) plan: &'a GenerationPlan,
    pub(super) pass: &'a PassPlan,
    pub(super) seed: Seed,
    pub(super) init_image: Option<&'a InitImage>,
    pub(super) device: &'a DeviceInstructor,
}

pub(super) struct PassStart {
    /// `[1, H/8, W/8, C]`, f32, at the pass's first level.
    pub(super) x: Tensor,
    /// The image's stream after the draws for `x`.
    pub(super) noise: NoiseSource,
    pub(super) masking: Option<Masking>,
}

pub(super) struct PassEnd {
    pub(super) latents: Tensor,
    pub(super) noise: NoiseSource,
    pub(super) masking: Option<Masking>,
    /// True if the pass's UNet takes the mask as channels.
    pub(super) took_mask: bool,
}

/// Starts a pass after `previous`, the end of the one before.
///
/// # Errors
/// Those of loading and of the VAE.
pub(super) fn start(task: &StartTask<'_>, previous: Option<PassEnd>, session: &mut Session<'_>) -> Result<PassStart> {
    let StartTask { plan, pass, .. } = *task;
    let ImageSize { width, height } = pass.size;
    match (&pass.entry, previous) {
        (PassEntry::Noise, _) => {
            let mut noise = task.noise(session.placement);
            let x = (noise.initial()? * pass.sampling.init_scale)?;
            Ok(PassStart { x, noise, masking: task.unmasked(session)? })
        }
        (PassEntry::Image(options), _) => from_image(task, options, session),
        (PassEntry::Latents(upscaler), Some(PassEnd { latents, .. })) => {
            let upscale = UpscaleTask { image: &latents, width: width / 8, height: height / 8 };
            let latents = session.ctx.perform(*upscaler, upscale)?;
            let noise = task.noise(session.placement);
            task.renoised(&latents, noise, session)
        }
        (PassEntry::Pixels(upscaler), Some(PassEnd { latents, .. })) => {
            let image = decode(plan, &latents, task.device, session)?;
            let larger = session.ctx.perform(*upscaler, UpscaleTask { image: &image, width, height })?;
            let mut noise = task.noise(session.placement);
            let pixels = larger.to_tensor(&session.placement.device)?;
            let latents = encode(plan, &pixels, Some(&mut noise), session)?;
            task.renoised(&latents, noise, session)
        }
        (PassEntry::Carried, Some(PassEnd { latents: x, noise, masking, took_mask })) => {
            // A mask stays in effect for the refiner, if it takes the mask in the same way.
            let takes_mask = took_mask && pass.checkpoint.takes_mask();
            let stays = |masking: &Masking| masking.outside.is_some() || takes_mask;
            let masking = match masking.filter(stays) {
                Some(masking) => Some(masking),
                None => task.unmasked(session)?,
            };
            Ok(PassStart { x, noise, masking })
        }
        (PassEntry::Latents(_) | PassEntry::Pixels(_) | PassEntry::Carried, None) => {
            Err(Error::bug("a pass without the latents of the one before"))
        }
    }
}

impl StartTask<'_> {
    /// The image's noise at the pass's size, from its beginning.
    fn noise(&self, placement: &Placement) -> NoiseSource {
        let (plan, ImageSize { width, height }) = (self.plan, self.pass.size);
        let channels = plan.checkpoint.vae.latent_channels;
        NoiseSource::new(plan.rng, &[self.seed.main], channels, height / 8, width / 8, &placement.device)
            .varied(&[self.seed.variation])
    }

    /// `latents` with noise at the pass's first level.
    fn renoised(&self, latents: &Tensor, mut noise: NoiseSource, session: &mut Session<'_>) -> Result<PassStart> {
        let x = noised(latents, &noise.initial()?, self.pass.sampling.first())?;
        Ok(PassStart { x, noise, masking: self.unmasked(session)? })
    }

    /// The channels of an inpainting UNet if everything is repainted: a mask of ones and a mid-grey image. `None` for other
    /// UNets.
    fn unmasked(&self, session: &mut Session<'_>) -> Result<Option<Masking>> {
        if !self.pass.checkpoint.takes_mask() {
            return Ok(None);
        }
        let (plan, ImageSize { width, height }) = (self.plan, self.pass.size);
        let all = Gray8 { width, height, data: vec![255; width * height] };
        let mask = latent_mask(&all, false, plan.checkpoint.vae.reduction(), session.placement)?;
        let grey = Rgb8 { width, height, data: vec![0; 3 * width * height] };
        let masked = encode(plan, &masked_image(&grey, &all, session.placement)?, None, session)?;
        let concat = Some(Tensor::cat(&[&mask, &masked], 3)?);
        Ok(Some(Masking { mask, outside: None, concat }))
    }
}

fn from_image(task: &StartTask<'_>, options: &InitImagePlan, session: &mut Session<'_>) -> Result<PassStart> {
    let StartTask { plan, pass, .. } = *task;
    let init_image = task.init_image.ok_or_else(|| Error::bug("a pass without its image"))?;
    if options.concat {
        return from_concatenated(task, init_image, session);
    }
    if let Some(mask) = &init_image.mask {
        return from_masked(task, options, (&init_image.image, mask), session);
    }
    let mut noise = task.noise(session.placement);
    let pixels = init_image.image.to_tensor(&session.placement.device)?;
    let latents = encode(plan, &pixels, options.sampled.then_some(&mut noise), session)?;
    let x = match options.adds_noise {
        true => noised(&latents, &noise.initial()?, pass.sampling.first())?,
        false => latents,
    };
    Ok(PassStart { x, noise, masking: task.unmasked(session)? })
}

fn from_masked(
    task: &StartTask<'_>,
    options: &InitImagePlan,
    (image, mask): (&Rgb8, &Gray8),
    session: &mut Session<'_>,
) -> Result<PassStart> {
    let StartTask { plan, pass, .. } = *task;
    let takes_mask = plan.checkpoint.takes_mask();
    let mut noise = task.noise(session.placement);
    let in_latents = latent_mask(mask, options.soft_mask, plan.checkpoint.vae.reduction(), session.placement)?;
    let latents = match takes_mask && options.from_noise {
        true => None,
        false => {
            let pixels = image.to_tensor(&session.placement.device)?;
            Some(encode(plan, &pixels, options.sampled.then_some(&mut noise), session)?)
        }
    };
    let drawn = noise.initial()?;
    let x = match &latents {
        _ if options.from_noise => (&drawn * pass.sampling.init_scale)?,
        Some(latents) => {
            let filled = filled(latents, &drawn, &in_latents, options)?;
            if options.adds_noise { noised(&filled, &drawn, pass.sampling.first())? } else { filled }
        }
        None => return Err(Error::bug("a pass that starts from an image has none")),
    };
    let masking = match latents.filter(|_| !takes_mask) {
        Some(latents) => {
            if options.sampled {
                noise.draw()?;
            }
            Masking { mask: in_latents, outside: Some(Outside { latents, noise: drawn }), concat: None }
        }
        None => {
            let pixels = masked_image(image, mask, session.placement)?;
            let masked = encode(plan, &pixels, options.sampled.then_some(&mut noise), session)?;
            let concat = Some(Tensor::cat(&[&in_latents, &masked], 3)?);
            Masking { mask: in_latents, outside: None, concat }
        }
    };
    Ok(PassStart { x, noise, masking: Some(masking) })
}

/// Noise, with the image's most likely latents as further channels: instruct-pix2pix.
fn from_concatenated(task: &StartTask<'_>, init_image: &InitImage, session: &mut Session<'_>) -> Result<PassStart> {
    let StartTask { plan, pass, .. } = *task;
    let pixels = init_image.image.to_tensor(&session.placement.device)?;
    let latents = encode(plan, &pixels, None, session)?;
    let concat = match plan.checkpoint.scales_image {
        true => latents,
        false => plan.checkpoint.vae.from_model(&latents)?,
    };
    let mut noise = task.noise(session.placement);
    let x = (noise.initial()? * pass.sampling.init_scale)?;
    let (batch, height, width, _) = concat.dims4()?;
    let mask = Tensor::ones((batch, height, width, 1), concat.dtype(), concat.device())?;
    Ok(PassStart { x, noise, masking: Some(Masking { mask, outside: None, concat: Some(concat) }) })
}

/// The image's latents, with the masked part filled as the request states.
fn filled(latents: &Tensor, noise: &Tensor, mask: &Tensor, options: &InitImagePlan) -> Result<Tensor> {
    let fill = options.options.mask.as_ref().map_or(InpaintingFill::Original, |mask| mask.fill);
    let unmasked = || -> Result<Tensor> { Ok(latents.broadcast_mul(&(1.0 - mask)?)?) };
    match fill {
        InpaintingFill::Original | InpaintingFill::Fill => Ok(latents.clone()),
        InpaintingFill::Zeros => unmasked(),
        InpaintingFill::Noise => Ok((unmasked()? + noise.broadcast_mul(mask)?)?),
    }
}
