//! Turns names and numbers of a request into a sampling plan.

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Instructor;
use crate::scheduler::aliases;
use crate::scheduler::edm::Edm;
use crate::scheduler::interface::{
    Description, Listed, Listing, Request, Response, SamplingOptions, Scheduler, Settings,
};
use crate::scheduler::schedule::{Prediction, SamplingPlan, SchedulerConfig, TimestepSpacing, Training};
use crate::scheduler::trajectory::Terrain;
use crate::scheduler::workers::spacing::{Ask, Spacing, Table, at_sigmas, at_timesteps};
use crate::scheduler::workers::{End, Grid, Profile, SAMPLERS, SPACINGS, Sampler};
use crate::units::Steps;

/// Steps of a request that says nothing of them.
const DEFAULT_STEPS: u16 = 25;

/// The configured name that stands for the checkpoint's own sampler.
const AUTO: &str = "auto";

pub struct SchedulerInstructor {
    settings: Settings,
}

/// Where the levels of a run come from.
enum Source<'a> {
    Spacing(&'static str, &'static Spacing),
    Sigmas(&'a [f64]),
    Timesteps(&'a [f64]),
}

impl SchedulerInstructor {
    /// # Errors
    /// `unknown_name` when the configured sampler is none.
    pub fn new(settings: Settings) -> Result<Self> {
        if settings.default_scheduler != AUTO {
            aliases::sampler(&settings.default_scheduler).map_err(|error| error.at("default_scheduler"))?;
        }
        Ok(Self { settings })
    }

    /// Decides everything that a wish leaves open.
    ///
    /// # Errors
    /// `unknown_name` for a sampler or schedule, `invalid_parameter` for numbers that give no run.
    pub fn plan(&self, options: &SamplingOptions, config: &SchedulerConfig) -> Result<SamplingPlan> {
        let ((sampler_name, sampler), named) = self.sampler(options, config)?;
        let profile = sampler.profile();
        let source = source(options, config, named)?;
        let steps = steps(options, &source)?;
        let zero_terminal_snr = options.zero_terminal_snr.or(config.rescale_betas_zero_snr).unwrap_or(false);
        let training = Training::new(config, zero_terminal_snr)?;
        let eta = eta(options, sampler_name, profile)?;
        if training.edm.is_some() {
            suits_edm(options, &source, (sampler_name, profile), zero_terminal_snr)?;
        }

        let strides = match &source {
            Source::Spacing(_, spacing) => spacing.strides,
            Source::Sigmas(_) | Source::Timesteps(_) => None,
        };
        let base = strides.or(config.timestep_spacing).unwrap_or(TimestepSpacing::Leading);
        let ask = Ask {
            training: &training,
            steps,
            grid: profile.grid,
            base,
            offset: config.steps_offset,
            distilled: config.original_inference_steps,
        };
        if profile.grid == Grid::Distilled && strides.is_some() && steps > ask.distilled.min(training.sigmas.len()) {
            return Err(Error::invalid(
                "steps",
                format!("must be at most {} for `{sampler_name}`, got {steps}", ask.distilled),
            ));
        }
        let table = table(&ask, &source);
        let end = match &source {
            Source::Sigmas(sigmas) => sigmas.last().copied().filter(|last| *last == 0.0),
            // Where these σ end, the reference repeats the last; with one step that is the highest.
            Source::Spacing(_, Spacing { strides: None, curve: true, .. }) if profile.end == End::SigmaMin => {
                table.sigmas.last().copied()
            }
            Source::Spacing(..) | Source::Timesteps(_) => None,
        };
        check(&table, &training, &source, steps)?;

        let terrain = Terrain { profile, config, training: &training, strides: strides.is_some(), end, eta };
        let path = terrain.path(&table);
        let prediction = options.prediction_type.unwrap_or(config.prediction_type);
        if prediction == Prediction::Epsilon && path.iter().any(|step| step.at.alpha == 0.0) {
            let message = "leaves no signal at the first step, from which noise cannot be predicted";
            return Err(Error::InvalidParameter {
                field: "zero_terminal_snr".to_owned(),
                message: message.to_owned(),
                hint: Some("set `prediction_type` to `v_prediction`".to_owned()),
            });
        }
        let sigma_end = path.last().map_or(0.0, |step| f64::from(step.to.ratio() as f32));
        let sigma_top = table.sigmas.iter().copied().fold(0.0, f64::max);
        let init_scale = match (profile.grid, base) {
            (Grid::Real | Grid::RealRounded, _) if training.edm.is_some() => (sigma_top * sigma_top + 1.0).sqrt(),
            (Grid::Whole | Grid::Distilled | Grid::Padded, _) => 1.0,
            (Grid::Real | Grid::RealRounded, TimestepSpacing::Leading) => (sigma_top * sigma_top + 1.0).sqrt(),
            (Grid::Real | Grid::RealRounded, TimestepSpacing::Trailing | TimestepSpacing::Linspace) => sigma_top,
        };
        Ok(SamplingPlan {
            sampler: sampler_name,
            schedule: match source {
                Source::Spacing(name, _) => name,
                Source::Sigmas(_) => "sigmas",
                Source::Timesteps(_) => "timesteps",
            },
            sigmas: table.sigmas.into_iter().chain([sigma_end]).collect(),
            timesteps: table.timesteps,
            run: 0..path.len(),
            path,
            init_scale,
            eta,
            prediction,
            zero_terminal_snr,
            edm: training.edm,
            num_train_timesteps: config.num_train_timesteps,
            calls: profile.calls,
        })
    }

    fn sampler(&self, options: &SamplingOptions, config: &SchedulerConfig) -> Result<aliases::Named> {
        let name = options.sampler_name.as_deref().unwrap_or(&self.settings.default_scheduler);
        if name != AUTO {
            return aliases::sampler(name);
        }
        let own = config.class_name.as_deref().unwrap_or("EulerDiscreteScheduler");
        if own.ends_with("DPMSolverMultistepScheduler") && config.algorithm_type.as_deref() == Some("sde-dpmsolver++") {
            return aliases::sampler("dpmpp_2m_sde");
        }
        aliases::sampler(own).map_err(|_| {
            Error::invalid("sampler_name", format!("must be given: the checkpoint's own `{own}` is not supported"))
        })
    }
}

/// The request's own levels, or its schedule, or the one in the sampler's name, or the checkpoint's.
fn source<'a>(
    options: &'a SamplingOptions,
    config: &SchedulerConfig,
    named: Option<(&'static str, &'static Spacing)>,
) -> Result<Source<'a>> {
    let said = match options.scheduler.as_deref() {
        // What a plan of the request's own levels is called, so that a result's parameters can be sent again.
        Some("sigmas") if options.sigmas.is_some() => None,
        Some("timesteps") if options.timesteps.is_some() => None,
        said => said.map(aliases::schedule).transpose()?.flatten(),
    };
    let scheduled = said.is_some() || named.is_some();
    match (&options.sigmas, &options.timesteps) {
        (Some(_), Some(_)) => return Err(Error::invalid("sigmas", "and `timesteps` must not both be given")),
        (Some(_), None) if scheduled => {
            return Err(Error::invalid("sigmas", "and `scheduler` must not both be given"));
        }
        (None, Some(_)) if scheduled => {
            return Err(Error::invalid("timesteps", "and `scheduler` must not both be given"));
        }
        (Some(sigmas), None) => return Ok(Source::Sigmas(sigmas)),
        (None, Some(timesteps)) => return Ok(Source::Timesteps(timesteps)),
        (None, None) => {}
    }
    let edm = if config.is_edm() { Some(Edm::schedule(config)?) } else { None };
    let own = || match config {
        _ if edm.is_some() => edm.unwrap_or_default(),
        SchedulerConfig { use_karras_sigmas: Some(true), .. } => "karras",
        SchedulerConfig { use_exponential_sigmas: Some(true), .. } => "exponential",
        SchedulerConfig { use_beta_sigmas: Some(true), .. } => "beta",
        SchedulerConfig { timestep_spacing, .. } => timestep_spacing.unwrap_or(TimestepSpacing::Leading).name(),
    };
    match (said, named) {
        (Some((said, _)), Some((named, _))) if said != named => {
            Err(Error::invalid("scheduler", format!("must be `{named}` as `sampler_name` says, got `{said}`")))
        }
        (Some((name, spacing)), _) | (None, Some((name, spacing))) => Ok(Source::Spacing(name, spacing)),
        (None, None) => Ok(Source::Spacing(own(), SPACINGS.get(own())?)),
    }
}

/// Refuses what goes by numbered timesteps, which such a network has none of.
fn suits_edm(
    options: &SamplingOptions,
    source: &Source<'_>,
    (name, profile): (&str, &Profile),
    zero: bool,
) -> Result<()> {
    let refuse = |field: &str, message: String| Err(Error::invalid(field, message));
    if profile.grid == Grid::Distilled {
        return refuse("sampler_name", format!("must be another than `{name}` for a model without numbered timesteps"));
    }
    if zero && options.zero_terminal_snr.is_some() {
        return refuse("zero_terminal_snr", "must be false for a model without numbered timesteps".to_owned());
    }
    match (source, options.prediction_type) {
        (_, Some(Prediction::Sample)) => {
            refuse("prediction_type", "must be `epsilon` or `v_prediction` for this model".to_owned())
        }
        (Source::Timesteps(_), _) => {
            refuse("timesteps", "must be left out for a model without numbered timesteps: give `sigmas`".to_owned())
        }
        (Source::Spacing(name, Spacing { curve: false, .. }), _) => {
            refuse("scheduler", format!("must be `karras`, `exponential` or `beta` for this model, got `{name}`"))
        }
        (Source::Spacing(..) | Source::Sigmas(_), _) => Ok(()),
    }
}

/// How many steps, and whether the request's own levels are that many.
fn steps(options: &SamplingOptions, source: &Source<'_>) -> Result<usize> {
    let said = match options.steps {
        Some(said) => u32::try_from(said)
            .ok()
            .and_then(Steps::new)
            .map(Some)
            .ok_or_else(|| Error::invalid("steps", format!("must be 1 to {}, got {said}", Steps::MAX)))?,
        None => None,
    };
    let (field, own) = match source {
        Source::Spacing(..) => return Ok(said.map_or(usize::from(DEFAULT_STEPS), Steps::get)),
        Source::Sigmas(sigmas) => ("sigmas", sigmas.len() - usize::from(sigmas.last() == Some(&0.0))),
        Source::Timesteps(timesteps) => ("timesteps", timesteps.len()),
    };
    if !(1..=usize::from(Steps::MAX)).contains(&own) {
        return Err(Error::invalid(field, format!("must give 1 to {} steps, got {own}", Steps::MAX)));
    }
    match said {
        Some(said) if said.get() != own => {
            Err(Error::invalid("steps", format!("must be {own}, as many as `{field}` gives, got {}", said.get())))
        }
        _ => Ok(own),
    }
}

fn eta(options: &SamplingOptions, name: &str, profile: &Profile) -> Result<f64> {
    let said = options.eta.unwrap_or(profile.eta.unwrap_or(0.0));
    if !(0.0..=1.0).contains(&said) {
        return Err(Error::invalid("eta", format!("must be 0 to 1, got {said}")));
    }
    if profile.eta.is_none() && said != 0.0 {
        return Err(Error::invalid("eta", format!("must be 0 or left out for `{name}`, which has none, got {said}")));
    }
    Ok(said)
}

/// σ and timesteps, rounded as the grid has them.
fn table(ask: &Ask<'_>, source: &Source<'_>) -> Table {
    let mut table = match source {
        Source::Spacing(_, spacing) => (spacing.table)(ask),
        Source::Sigmas(sigmas) => at_sigmas(ask, sigmas.iter().take(ask.steps).map(|s| f64::from(*s as f32)).collect()),
        Source::Timesteps(timesteps) => at_timesteps(ask, timesteps.to_vec()),
    };
    let karras = matches!(source, Source::Spacing("karras", _));
    let derived = !karras && matches!(source, Source::Spacing(_, Spacing { curve: true, .. }));
    for timestep in &mut table.timesteps {
        *timestep = match ask.grid {
            _ if ask.training.edm.is_some() => f64::from(*timestep as f32),
            Grid::Padded | Grid::RealRounded if karras => timestep.round_ties_even(),
            Grid::Padded if derived => timestep.trunc(),
            _ => f64::from(*timestep as f32),
        };
    }
    for sigma in &mut table.sigmas {
        *sigma = f64::from(*sigma as f32);
    }
    table
}

/// Levels must fall, and timesteps be among those of training.
fn check(table: &Table, training: &Training, source: &Source<'_>, steps: usize) -> Result<()> {
    let last = training.last();
    let field = match source {
        Source::Spacing(..) => "steps",
        Source::Sigmas(_) => "sigmas",
        Source::Timesteps(_) => "timesteps",
    };
    let falls = table.sigmas.is_sorted_by(|a, b| a > b) && table.sigmas.iter().all(|s| s.is_finite() && *s > 0.0);
    let within = training.edm.is_some() || table.timesteps.iter().all(|t| (0.0..=last).contains(t));
    match (source, falls && within) {
        (_, true) => Ok(()),
        (Source::Spacing(name, _), false) => {
            Err(Error::invalid(field, format!("must be fewer for the schedule `{name}`, got {steps}")))
        }
        (Source::Sigmas(_), false) => Err(Error::invalid(field, "must be positive and fall from first to last")),
        (Source::Timesteps(_), false) => {
            Err(Error::invalid(field, format!("must be 0 to {last} and fall from first to last")))
        }
    }
}

impl Instructor for SchedulerInstructor {
    type Interface = Scheduler;
    type Resources = ();

    fn instruct(&self, request: Request, (): &mut (), _ctx: &Context) -> Result<Response> {
        match request {
            Request::List(_) => Ok(Response::List(listing())),
            Request::Describe(options) => {
                let plan = self.plan(&options, &SchedulerConfig::sdxl())?;
                Ok(Response::Describe(Description {
                    sampler_name: plan.sampler,
                    scheduler: plan.schedule,
                    steps: plan.steps(),
                    evaluations: plan.evaluations(),
                    eta: plan.eta,
                    prediction_type: plan.prediction,
                    zero_terminal_snr: plan.zero_terminal_snr,
                    init_scale: plan.init_scale,
                    sigmas: plan.sigmas,
                    timesteps: plan.timesteps,
                }))
            }
        }
    }
}

fn listing() -> Listing {
    let sampler = |(name, sampler): (&'static str, &'static Sampler)| {
        let Profile { label, about, aliases, .. } = sampler.profile();
        Listed { name, label, aliases, about }
    };
    let spacing = |(name, Spacing { label, about, aliases, .. }): (&'static str, &'static Spacing)| Listed {
        name,
        label,
        aliases,
        about,
    };
    Listing { samplers: SAMPLERS.iter().map(sampler).collect(), schedules: SPACINGS.iter().map(spacing).collect() }
}
