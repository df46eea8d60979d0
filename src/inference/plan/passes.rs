//! The denoising passes of an image: the first one, a larger second one, and the refiner.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::inference::plan::guidance::{GuidanceOptions, guidance};
use crate::inference::plan::init_image::{cut, first_step};
use crate::inference::plan::limits::{refuse_given, within};
use crate::inference::plan::size::time_ids;
use crate::inference::plan::{HiresPlan, InitImagePlan, PassEntry, PassPlan};
use crate::inference::request::generate::GenerateRequest;
use crate::model::checkpoint::Checkpoint;
use crate::model::networks::vae::VaeConfig;
use crate::postprocessing::find_upscaler;
use crate::postprocessing::upscaler::{UpscaleMethod, Upscaler};
use crate::scheduler::instructor::SchedulerInstructor;
use crate::scheduler::interface::SamplingOptions;
use crate::scheduler::plan::SamplingPlan;
use crate::units::ImageSize;

/// Default `steps`.
const STEPS: i64 = 25;
/// AUTOMATIC1111's defaults.
const HR_SCALE: f64 = 2.0;
const HR_STRENGTH: f64 = 0.75;
/// Default `refiner.switch_at`, as in diffusers' examples.
const SWITCH_AT: f64 = 0.8;

/// Plans the passes of one request.
pub(crate) struct PassPlanner<'a> {
    pub(crate) request: &'a GenerateRequest,
    pub(crate) scheduler: &'a SchedulerInstructor,
    /// Largest side in pixels.
    pub(crate) max_side: u32,
    pub(crate) sampling: SamplingOptions,
}

/// Sampling options of a request, with the default number of steps.
pub(crate) fn sampling_options(request: &GenerateRequest) -> SamplingOptions {
    let own_schedule = request.sigmas.is_some() || request.timesteps.is_some();
    SamplingOptions {
        sampler_name: request.sampler_name.clone(),
        scheduler: request.scheduler.clone(),
        steps: request.steps.or(Some(STEPS)).filter(|_| !own_schedule),
        eta: request.eta,
        sigmas: request.sigmas.clone(),
        timesteps: request.timesteps.clone(),
        prediction_type: request.prediction_type,
        zero_terminal_snr: request.zero_terminal_snr,
    }
}

impl PassPlanner<'_> {
    /// The first pass. Completes `options` with their defaults.
    ///
    /// # Errors
    /// A value that cannot be used.
    pub(crate) fn first(
        &self,
        checkpoint: &Arc<Checkpoint>,
        size: ImageSize,
        init_image: Option<InitImagePlan>,
        options: &mut GuidanceOptions,
    ) -> Result<PassPlan> {
        let guidance = guidance(self.request, options, checkpoint)?;
        let sampling = self.scheduler.plan(&self.sampling, &checkpoint.scheduler)?;
        let sampling = cut(self.request, init_image.as_ref(), sampling)?;
        Ok(PassPlan {
            time_ids: time_ids(self.request, size, checkpoint)?,
            entry: init_image.map_or(PassEntry::Noise, |init_image| PassEntry::Image(Box::new(init_image))),
            checkpoint: Arc::clone(checkpoint),
            size,
            sampling,
            guidance,
        })
    }

    /// The larger pass after `first`, if the request enables it.
    ///
    /// # Errors
    /// A value that cannot be used; `unknown_name` for the upscaler.
    pub(crate) fn hires(&self, first: &PassPlan) -> Result<Option<(PassPlan, HiresPlan)>> {
        let request = self.request;
        if !request.enable_hr.unwrap_or(false) {
            let given = [
                ("hr_scale", request.hr_scale.is_some()),
                ("hr_upscaler", request.hr_upscaler.is_some()),
                ("hr_second_pass_steps", request.hr_second_pass_steps.is_some()),
                ("hr_resize_x", request.hr_resize_x.is_some()),
                ("hr_resize_y", request.hr_resize_y.is_some()),
            ];
            return refuse_given(&given, "needs `\"enable_hr\": true`").map(|()| None);
        }
        if request.init_image.is_some() {
            return Err(Error::invalid("enable_hr", "belongs to text to image, and `init_image` is given"));
        }
        if request.denoising_end.is_some() {
            return Err(Error::invalid("denoising_end", "and `enable_hr` must not both be given"));
        }
        let strength = within("denoising_strength", request.denoising_strength.unwrap_or(HR_STRENGTH), 0.0, 1.0)?;
        let scale = within("hr_scale", request.hr_scale.unwrap_or(HR_SCALE), 1.0, 8.0)?;
        let size = self.hires_size(first.size, scale)?;
        let requested = request.hr_upscaler.as_deref().unwrap_or("latent");
        let (upscaler, Upscaler { method, .. }) = find_upscaler(requested).map_err(|error| error.at("hr_upscaler"))?;
        let pass = PassPlan {
            entry: match *method {
                UpscaleMethod::Latents(upscaler) => PassEntry::Latents(upscaler),
                UpscaleMethod::Pixels(upscaler) => PassEntry::Pixels(upscaler),
            },
            checkpoint: Arc::clone(&first.checkpoint),
            size,
            sampling: self.hires_sampling(&first.checkpoint, strength)?,
            time_ids: time_ids(request, size, &first.checkpoint)?,
            guidance: first.guidance.clone(),
        };
        Ok(Some((pass, HiresPlan { strength, scale, upscaler })))
    }

    fn hires_size(&self, first: ImageSize, scale: f64) -> Result<ImageSize> {
        let most = self.max_side as usize;
        let side = |field: &str, requested: Option<i64>, side: usize| -> Result<usize> {
            let (field, side) = match requested {
                Some(pixels) => (field, usize::try_from(pixels).unwrap_or(0)),
                None => ("hr_scale", (side as f64 * scale) as usize / 8 * 8),
            };
            match side % 8 == 0 && (64..=most).contains(&side) {
                true => Ok(side),
                false => Err(Error::invalid(field, format!("must give a multiple of 8 from 64 to {most}, got {side}"))),
            }
        };
        Ok(ImageSize {
            width: side("hr_resize_x", self.request.hr_resize_x, first.width)?,
            height: side("hr_resize_y", self.request.hr_resize_y, first.height)?,
        })
    }

    fn hires_sampling(&self, checkpoint: &Checkpoint, strength: f64) -> Result<SamplingPlan> {
        let steps = self.request.hr_second_pass_steps.filter(|steps| *steps != 0);
        let options = SamplingOptions { steps: steps.or(self.sampling.steps), ..self.sampling.clone() };
        let sampling = self.scheduler.plan(&options, &checkpoint.scheduler).map_err(|error| match (steps, error) {
            (Some(_), Error::InvalidParameter { field, message, hint }) if field == "steps" => {
                Error::InvalidParameter { field: "hr_second_pass_steps".to_owned(), message, hint }
            }
            (_, error) => error,
        })?;
        let count = sampling.trajectory.len();
        let start = first_step(count, strength);
        if start >= count {
            return Err(Error::invalid("denoising_strength", format!("must leave at least one of {count} steps")));
        }
        Ok(sampling.between(start..count))
    }

    /// The share of the noise levels at which the refiner takes over.
    ///
    /// # Errors
    /// `invalid_parameter` if it is out of range, or `denoising_end` is given too.
    pub(crate) fn switch_at(&self, requested: Option<f64>) -> Result<f64> {
        if self.request.denoising_end.is_some() {
            return Err(Error::invalid("denoising_end", "and `refiner` must not both be given"));
        }
        within("refiner.switch_at", requested.unwrap_or(SWITCH_AT), 0.0, 1.0)
    }

    /// The refiner's pass, which takes over from `before` at `switch_at`; shortens `before`.
    ///
    /// # Errors
    /// `invalid_parameter` for a model that cannot continue the other's latents, or if a pass has no step left.
    pub(crate) fn refiner(&self, before: &mut PassPlan, model: Arc<Checkpoint>, switch_at: f64) -> Result<PassPlan> {
        self.check_refiner(&before.checkpoint, &model)?;
        let until = before.sampling.until_share(switch_at).min(before.sampling.run.end);
        // The same sampler and schedule, whatever the refiner's own are: it continues at the level where the base stops.
        let options = SamplingOptions {
            sampler_name: Some(before.sampling.sampler.to_owned()),
            scheduler: Some(before.sampling.schedule.to_owned()),
            steps: i64::try_from(before.sampling.trajectory.len()).ok(),
            ..self.sampling.clone()
        };
        let sampling = self.scheduler.plan(&options, &model.scheduler)?;
        let (start, from, steps) =
            (before.sampling.run.start, sampling.from_share(switch_at), sampling.trajectory.len());
        if until <= start || from >= steps {
            let message = format!("must leave a step to each model, got {switch_at}");
            return Err(Error::invalid("refiner.switch_at", message));
        }
        before.sampling = before.sampling.clone().between(start..until);
        // Layers are named by model.
        let mut options = GuidanceOptions { image_guidance_scale: None, ..GuidanceOptions::of(self.request) };
        Ok(PassPlan {
            entry: PassEntry::Carried,
            size: before.size,
            sampling: sampling.between(from..steps),
            time_ids: time_ids(self.request, before.size, &model)?,
            guidance: guidance(self.request, &mut options, &model)?,
            checkpoint: model,
        })
    }

    fn check_refiner(&self, base: &Checkpoint, refiner: &Checkpoint) -> Result<()> {
        let refuse = |message: String| Err(Error::invalid("refiner.model", message));
        let masked = self.request.mask.is_some() || self.request.extend.is_some();
        let (takes, given) = (refiner.unet.in_channels, base.unet.in_channels);
        if masked && takes != given {
            return refuse(format!("takes {takes} channels, and the model that it follows {given}"));
        }
        let (name, base_name) = (&refiner.name, &base.name);
        if !same_latents(&refiner.vae, &base.vae) {
            return refuse(format!("names `{name}`, whose latents differ from those of `{base_name}`"));
        }
        if refiner.scheduler.is_edm() != base.scheduler.is_edm() {
            return refuse(format!("names `{name}`, whose noise is of another kind than that of `{base_name}`"));
        }
        if refiner.family.edits {
            return refuse(format!("names `{name}`, which edits an image and refines none"));
        }
        Ok(())
    }
}

/// True if the latents of two models have as many channels, and the same scale and shift.
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
