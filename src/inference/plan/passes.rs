//! Decides the runs that follow the first: a larger second pass, and the refiner.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface::{GenerateRequest, RefinerOptions};
use crate::inference::plan::build::{time_ids, within};
use crate::inference::plan::guidance_build::guidance;
use crate::inference::plan::init_image::by_strength;
use crate::inference::plan::{Entry, PassPlan};
use crate::managers::Managers;
use crate::model::checkpoint::Checkpoint;
use crate::model::networks::vae::VaeConfig;
use crate::postprocessing::find_upscaler;
use crate::postprocessing::upscaler::{UpscaleMethod, Upscaler};
use crate::scheduler::interface::SamplingOptions;
use crate::scheduler::plan::SamplingPlan;
use crate::units::ImageSize;

/// As AUTOMATIC1111 has them.
const HR_SCALE: f64 = 2.0;
const HR_STRENGTH: f64 = 0.75;
/// Where diffusers' examples hand over to the refiner.
const SWITCH_AT: f64 = 0.8;

/// What the runs of one request are planned from.
pub(crate) struct First<'a> {
    pub(crate) checkpoint: &'a Arc<Checkpoint>,
    pub(crate) size: ImageSize,
    pub(crate) sampling: &'a mut SamplingPlan,
    pub(crate) options: &'a SamplingOptions,
}

impl InferenceInstructor {
    /// The runs after the first; the refiner shortens the one before it. Says what it decided in `parameters`.
    ///
    /// # Errors
    /// `invalid_parameter`, `unknown_name`, and those of finding the refiner.
    pub(crate) fn further(
        &self,
        request: &GenerateRequest,
        first: First<'_>,
        parameters: &mut GenerateRequest,
        resources: &mut Managers,
    ) -> Result<Vec<PassPlan>> {
        let First { checkpoint, size, sampling, options } = first;
        let mut runs = Vec::new();
        if request.enable_hr.unwrap_or(false) {
            runs.push(self.second_pass(request, (checkpoint, size, options), parameters)?);
        } else {
            let given = [
                ("hr_scale", request.hr_scale.is_some()),
                ("hr_upscaler", request.hr_upscaler.is_some()),
                ("hr_second_pass_steps", request.hr_second_pass_steps.is_some()),
                ("hr_resize_x", request.hr_resize_x.is_some()),
                ("hr_resize_y", request.hr_resize_y.is_some()),
            ];
            if let Some((field, _)) = given.iter().find(|(_, given)| *given) {
                return Err(Error::invalid(*field, "needs `\"enable_hr\": true`"));
            }
        }
        let Some(refiner) = &request.refiner else { return Ok(runs) };
        if request.denoising_end.is_some() {
            return Err(Error::invalid("denoising_end", "and `refiner` must not both be given"));
        }
        let switch_at = within("refiner.switch_at", refiner.switch_at.unwrap_or(SWITCH_AT), 0.0, 1.0)?;
        let model = resources.model().catalog.resolve(Some(&refiner.model)).map_err(|error| error.below("refiner"))?;
        let masked = request.mask.is_some() || request.extend.is_some();
        let channels = (checkpoint.unet.in_channels, model.unet.in_channels);
        if masked && channels.0 != channels.1 {
            let message = format!("takes {} channels, and the model that it follows {}", channels.1, channels.0);
            return Err(Error::invalid("refiner.model", message));
        }
        if !same_latents(&model.vae, &checkpoint.vae) {
            let message =
                format!("names `{}`, whose latents are others than those of `{}`", model.name, checkpoint.name);
            return Err(Error::invalid("refiner.model", message));
        }
        if model.scheduler.is_edm() != checkpoint.scheduler.is_edm() {
            let message =
                format!("names `{}`, whose noise is of another kind than that of `{}`", model.name, checkpoint.name);
            return Err(Error::invalid("refiner.model", message));
        }
        if model.family.edits {
            let message = format!("names `{}`, which edits an image and refines none", model.name);
            return Err(Error::invalid("refiner.model", message));
        }
        parameters.refiner = Some(RefinerOptions { model: model.name.clone(), switch_at: Some(switch_at) });
        let (before, size) = match runs.last_mut() {
            Some(PassPlan { sampling, size, .. }) => (sampling, *size),
            None => (sampling, size),
        };
        let until = before.until_share(switch_at).min(before.run.end);
        // The same sampler on the same schedule, whatever the refiner's own would be: it goes on from the level at which
        // the other stops.
        let own = SamplingOptions {
            sampler_name: Some(before.sampler.to_owned()),
            scheduler: Some(before.schedule.to_owned()),
            steps: i64::try_from(before.trajectory.len()).ok(),
            ..options.clone()
        };
        let mut after = self.scheduler.plan(&own, &model.scheduler)?;
        let from = after.from_share(switch_at);
        if until <= before.run.start || from >= after.trajectory.len() {
            return Err(Error::invalid(
                "refiner.switch_at",
                format!("must leave a step to each model, got {switch_at}"),
            ));
        }
        *before = before.clone().between(before.run.start..until);
        let steps = after.trajectory.len();
        after = after.between(from..steps);
        let time_ids = time_ids(request, size, &model)?;
        // Layers are named by model.
        let mut own = GenerateRequest { image_guidance_scale: None, ..request.clone() };
        let guidance = guidance(&mut own, &model)?;
        runs.push(PassPlan { entry: Entry::Carried, checkpoint: model, size, sampling: after, time_ids, guidance });
        Ok(runs)
    }

    fn second_pass(
        &self,
        request: &GenerateRequest,
        (checkpoint, size, options): (&Arc<Checkpoint>, ImageSize, &SamplingOptions),
        parameters: &mut GenerateRequest,
    ) -> Result<PassPlan> {
        if request.init_image.is_some() {
            return Err(Error::invalid("enable_hr", "belongs to text to image, and `init_image` is given"));
        }
        if request.denoising_end.is_some() {
            return Err(Error::invalid("denoising_end", "and `enable_hr` must not both be given"));
        }
        let strength = within("denoising_strength", request.denoising_strength.unwrap_or(HR_STRENGTH), 0.0, 1.0)?;
        let scale = within("hr_scale", request.hr_scale.unwrap_or(HR_SCALE), 1.0, 8.0)?;
        let most = self.settings.max_side as usize;
        let side = |field: &str, options: Option<i64>, side: usize| -> Result<usize> {
            let side = match options {
                Some(pixels) => usize::try_from(pixels).unwrap_or(0),
                None => (side as f64 * scale) as usize / 8 * 8,
            };
            match side % 8 == 0 && (64..=most).contains(&side) {
                true => Ok(side),
                false => Err(Error::invalid(field, format!("must give a multiple of 8 from 64 to {most}, got {side}"))),
            }
        };
        let axis = |options: Option<i64>, field: &'static str| if options.is_some() { field } else { "hr_scale" };
        let size = ImageSize {
            width: side(axis(request.hr_resize_x, "hr_resize_x"), request.hr_resize_x, size.width)?,
            height: side(axis(request.hr_resize_y, "hr_resize_y"), request.hr_resize_y, size.height)?,
        };
        let requested = request.hr_upscaler.as_deref().unwrap_or("latent");
        let (upscaler, Upscaler { method, .. }) = find_upscaler(requested).map_err(|error| error.at("hr_upscaler"))?;
        let entry = match *method {
            UpscaleMethod::Latents(upscaler) => Entry::Latents(upscaler),
            UpscaleMethod::Pixels(upscaler) => Entry::Pixels(upscaler),
        };
        let steps = request.hr_second_pass_steps.filter(|steps| *steps != 0);
        let options = SamplingOptions { steps: steps.or(options.steps), ..options.clone() };
        let sampling = self.scheduler.plan(&options, &checkpoint.scheduler).map_err(|error| match (steps, error) {
            (Some(_), Error::InvalidParameter { field, message, hint }) if field == "steps" => {
                Error::InvalidParameter { field: "hr_second_pass_steps".to_owned(), message, hint }
            }
            (_, error) => error,
        })?;
        let count = sampling.trajectory.len();
        let start = by_strength(count, strength);
        if start >= count {
            return Err(Error::invalid("denoising_strength", format!("must leave at least one of {count} steps")));
        }
        parameters.enable_hr = Some(true);
        parameters.denoising_strength = Some(strength);
        parameters.hr_scale = (request.hr_resize_x.is_none() || request.hr_resize_y.is_none()).then_some(scale);
        parameters.hr_upscaler = Some(upscaler.to_owned());
        parameters.hr_second_pass_steps = i64::try_from(count).ok();
        Ok(PassPlan {
            entry,
            checkpoint: Arc::clone(checkpoint),
            size,
            sampling: sampling.between(start..count),
            time_ids: time_ids(request, size, checkpoint)?,
            guidance: guidance(&mut request.clone(), checkpoint)?,
        })
    }
}

/// Whether the latents of one model are those of the other: as many channels, scaled and shifted by as much.
fn same_latents(one: &VaeConfig, other: &VaeConfig) -> bool {
    let near = |one: f64, other: f64| (one - other).abs() <= 1e-6 * other.abs();
    let all = |one: &Option<Vec<f64>>, other: &Option<Vec<f64>>| match (one, other) {
        (None, None) => true,
        (Some(one), Some(other)) => one.len() == other.len() && one.iter().zip(other).all(|(a, b)| near(*a, *b)),
        _ => false,
    };
    one.latent_channels == other.latent_channels
        && near(one.scaling_factor, other.scaling_factor)
        && all(&one.latents_mean, &other.latents_mean)
        && all(&one.latents_std, &other.latents_std)
}
