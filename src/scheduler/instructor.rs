//! Turns sampling options and a checkpoint's scheduler configuration into a sampling plan.

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Instructor;
use crate::scheduler::aliases::{self, NamedSampler, NamedSpacing};
use crate::scheduler::config::{Prediction, SchedulerConfig, TimestepSpacing};
use crate::scheduler::edm::Edm;
use crate::scheduler::interface::{
    Description, Listed, Listing, Request, Response, SamplingOptions, Scheduler, Settings,
};
use crate::scheduler::plan::{SamplingPlan, Step};
use crate::scheduler::sampler::{End, Grid, Parameterization, Profile, Sampler};
use crate::scheduler::schedule::NoiseSchedule;
use crate::scheduler::trajectory::TrajectoryBuilder;
use crate::scheduler::workers::spacing::{LevelTable, Spacing, SpacingTask, at_sigmas, at_timesteps};
use crate::scheduler::workers::{SAMPLERS, SPACINGS};
use crate::units::Steps;

/// Default number of steps.
const DEFAULT_STEPS: u16 = 25;

/// The `default_scheduler` that selects the checkpoint's own sampler.
const AUTO: &str = "auto";

pub struct SchedulerInstructor {
    settings: Settings,
}

impl SchedulerInstructor {
    /// # Errors
    /// `unknown_name` if the configured sampler does not exist.
    pub fn new(settings: Settings) -> Result<Self> {
        if settings.default_scheduler != AUTO {
            aliases::sampler(&settings.default_scheduler).map_err(|error| error.at("default_scheduler"))?;
        }
        Ok(Self { settings })
    }

    /// Decides everything that the options leave open.
    ///
    /// # Errors
    /// `unknown_name` for a sampler or schedule, `invalid_parameter` for numbers that give no run.
    pub fn plan(&self, options: &SamplingOptions, config: &SchedulerConfig) -> Result<SamplingPlan> {
        let sampler = self.sampler(options, config)?;
        let profile = sampler.sampler.profile();
        let source = LevelSource::choose(options, config, sampler.schedule)?;
        let steps = source.steps(options)?;
        let zero_terminal_snr = options.zero_terminal_snr.or(config.rescale_betas_zero_snr).unwrap_or(false);
        let training = NoiseSchedule::new(config, zero_terminal_snr)?;
        let eta = eta(options, sampler.name, profile)?;
        if training.edm.is_some() {
            check_edm(options, &source, &sampler, zero_terminal_snr)?;
        }

        let strides = source.strides();
        let task = SpacingTask {
            training: &training,
            steps,
            grid: profile.grid,
            base: strides.or(config.timestep_spacing).unwrap_or(TimestepSpacing::Leading),
            offset: config.steps_offset,
            distilled: config.original_inference_steps,
        };
        if strides.is_some() {
            check_distilled(&task, sampler.name)?;
        }
        let table = source.table(&task);
        source.check(&table, &task)?;

        let sigma_end = source.sigma_end(&table, profile);
        let strided = strides.is_some();
        let trajectory =
            TrajectoryBuilder { profile, config, training: &training, strided, sigma_end, eta }.build(&table);
        let prediction = options.prediction_type.unwrap_or(config.prediction_type);
        check_prediction(prediction, &trajectory)?;
        let last_sigma = trajectory.last().map_or(0.0, |step| f64::from(step.to.ratio() as f32));
        Ok(SamplingPlan {
            sampler: sampler.name,
            schedule: source.name(),
            init_scale: init_scale(&task, &table),
            sigmas: table.sigmas.into_iter().chain([last_sigma]).collect(),
            timesteps: table.timesteps,
            run: 0..trajectory.len(),
            trajectory,
            eta,
            prediction,
            zero_terminal_snr,
            edm: training.edm,
            num_train_timesteps: config.num_train_timesteps,
            calls: profile.calls,
        })
    }

    fn sampler(&self, options: &SamplingOptions, config: &SchedulerConfig) -> Result<NamedSampler> {
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

/// The source of a run's noise levels.
enum LevelSource<'a> {
    Schedule(NamedSpacing),
    Sigmas(&'a [f64]),
    Timesteps(&'a [f64]),
}

impl<'a> LevelSource<'a> {
    /// The request's own levels, or else its schedule, the one in the sampler's name, or the checkpoint's.
    fn choose(options: &'a SamplingOptions, config: &SchedulerConfig, in_name: Option<NamedSpacing>) -> Result<Self> {
        let requested = match options.scheduler.as_deref() {
            // The schedule name in the echo of a request with its own levels, so that the echo can be sent again.
            Some("sigmas") if options.sigmas.is_some() => None,
            Some("timesteps") if options.timesteps.is_some() => None,
            requested => requested.map(aliases::schedule).transpose()?.flatten(),
        };
        let scheduled = requested.is_some() || in_name.is_some();
        match (&options.sigmas, &options.timesteps) {
            (Some(_), Some(_)) => return Err(Error::invalid("sigmas", "and `timesteps` must not both be given")),
            (Some(_), None) if scheduled => {
                return Err(Error::invalid("sigmas", "and `scheduler` must not both be given"));
            }
            (None, Some(_)) if scheduled => {
                return Err(Error::invalid("timesteps", "and `scheduler` must not both be given"));
            }
            (Some(sigmas), None) => return Ok(Self::Sigmas(sigmas)),
            (None, Some(timesteps)) => return Ok(Self::Timesteps(timesteps)),
            (None, None) => {}
        }
        let own = checkpoint_schedule(config)?;
        match (requested, in_name) {
            (Some(requested), Some(in_name)) if requested.name != in_name.name => Err(Error::invalid(
                "scheduler",
                format!("must be `{}` as `sampler_name` says, got `{}`", in_name.name, requested.name),
            )),
            (Some(named), _) | (None, Some(named)) => Ok(Self::Schedule(named)),
            (None, None) => Ok(Self::Schedule(NamedSpacing { name: own, spacing: SPACINGS.get(own)? })),
        }
    }

    /// The schedule's name in the plan.
    fn name(&self) -> &'static str {
        match self {
            Self::Schedule(NamedSpacing { name, .. }) => name,
            Self::Sigmas(_) => "sigmas",
            Self::Timesteps(_) => "timesteps",
        }
    }

    fn strides(&self) -> Option<TimestepSpacing> {
        match self {
            Self::Schedule(NamedSpacing { spacing, .. }) => spacing.strides,
            Self::Sigmas(_) | Self::Timesteps(_) => None,
        }
    }

    fn is_curve(&self) -> bool {
        matches!(self, Self::Schedule(NamedSpacing { spacing: Spacing { curve: true, .. }, .. }))
    }

    /// The number of steps, which must equal the number of the request's own levels.
    fn steps(&self, options: &SamplingOptions) -> Result<usize> {
        let out_of_range = |steps: i64| Error::invalid("steps", format!("must be 1 to {}, got {steps}", Steps::MAX));
        let in_range = |steps: i64| u32::try_from(steps).ok().and_then(Steps::new).ok_or_else(|| out_of_range(steps));
        let requested = options.steps.map(in_range).transpose()?.map(Steps::get);
        let (field, own) = match self {
            Self::Schedule(_) => return Ok(requested.unwrap_or(usize::from(DEFAULT_STEPS))),
            Self::Sigmas(sigmas) => ("sigmas", sigmas.len() - usize::from(sigmas.last() == Some(&0.0))),
            Self::Timesteps(timesteps) => ("timesteps", timesteps.len()),
        };
        if !(1..=usize::from(Steps::MAX)).contains(&own) {
            return Err(Error::invalid(field, format!("must give 1 to {} steps, got {own}", Steps::MAX)));
        }
        match requested {
            Some(steps) if steps != own => {
                Err(Error::invalid("steps", format!("must be {own}, as many as `{field}` gives, got {steps}")))
            }
            _ => Ok(own),
        }
    }

    /// σ and timesteps, rounded for the sampler's grid.
    fn table(&self, task: &SpacingTask<'_>) -> LevelTable {
        let mut table = match self {
            Self::Schedule(NamedSpacing { spacing, .. }) => (spacing.table)(task),
            Self::Sigmas(sigmas) => {
                at_sigmas(task, sigmas.iter().take(task.steps).map(|s| f64::from(*s as f32)).collect())
            }
            Self::Timesteps(timesteps) => at_timesteps(task, timesteps.to_vec()),
        };
        let karras = self.name() == "karras";
        let other_curve = self.is_curve() && !karras;
        for timestep in &mut table.timesteps {
            *timestep = match task.grid {
                _ if task.training.edm.is_some() => f64::from(*timestep as f32),
                Grid::Padded | Grid::ContinuousRounded if karras => timestep.round_ties_even(),
                Grid::Padded if other_curve => timestep.trunc(),
                _ => f64::from(*timestep as f32),
            };
        }
        for sigma in &mut table.sigmas {
            *sigma = f64::from(*sigma as f32);
        }
        table
    }

    /// Checks that levels fall and that timesteps are within those of training.
    fn check(&self, table: &LevelTable, task: &SpacingTask<'_>) -> Result<()> {
        let last = task.training.last();
        let falls = table.sigmas.is_sorted_by(|a, b| a > b) && table.sigmas.iter().all(|s| s.is_finite() && *s > 0.0);
        let within = task.training.edm.is_some() || table.timesteps.iter().all(|t| (0.0..=last).contains(t));
        if falls && within {
            return Ok(());
        }
        Err(match self {
            Self::Schedule(NamedSpacing { name, .. }) => {
                Error::invalid("steps", format!("must be fewer for the schedule `{name}`, got {}", task.steps))
            }
            Self::Sigmas(_) => Error::invalid("sigmas", "must be positive and fall from first to last"),
            Self::Timesteps(_) => {
                Error::invalid("timesteps", format!("must be 0 to {last} and fall from first to last"))
            }
        })
    }

    /// The σ at which the run ends, if the source decides it rather than the sampler.
    fn sigma_end(&self, table: &LevelTable, profile: &Profile) -> Option<f64> {
        match self {
            Self::Sigmas(sigmas) => sigmas.last().copied().filter(|last| *last == 0.0),
            // The reference repeats the last σ; with one step that is the highest.
            Self::Schedule(_) if self.is_curve() && profile.end == End::SigmaMin => table.sigmas.last().copied(),
            Self::Schedule(_) | Self::Timesteps(_) => None,
        }
    }
}

fn checkpoint_schedule(config: &SchedulerConfig) -> Result<&'static str> {
    if config.is_edm() {
        return Edm::schedule(config);
    }
    Ok(match config {
        SchedulerConfig { use_karras_sigmas: Some(true), .. } => "karras",
        SchedulerConfig { use_exponential_sigmas: Some(true), .. } => "exponential",
        SchedulerConfig { use_beta_sigmas: Some(true), .. } => "beta",
        SchedulerConfig { timestep_spacing, .. } => timestep_spacing.unwrap_or(TimestepSpacing::Leading).name(),
    })
}

fn eta(options: &SamplingOptions, name: &str, profile: &Profile) -> Result<f64> {
    let eta = options.eta.unwrap_or(profile.eta.unwrap_or(0.0));
    if !(0.0..=1.0).contains(&eta) {
        return Err(Error::invalid("eta", format!("must be 0 to 1, got {eta}")));
    }
    if profile.eta.is_none() && eta != 0.0 {
        return Err(Error::invalid("eta", format!("must be 0 or left out for `{name}`, which has none, got {eta}")));
    }
    Ok(eta)
}

/// Unit noise times this factor is the sample at the first level.
fn init_scale(task: &SpacingTask<'_>, table: &LevelTable) -> f64 {
    let highest = table.sigmas.iter().copied().fold(0.0, f64::max);
    match (task.grid.parameterization(), task.base) {
        (Parameterization::VariancePreserving, _) => 1.0,
        (Parameterization::VarianceExploding, TimestepSpacing::Trailing | TimestepSpacing::Linspace)
            if task.training.edm.is_none() =>
        {
            highest
        }
        (Parameterization::VarianceExploding, _) => (highest * highest + 1.0).sqrt(),
    }
}

/// Refuses options that need numbered timesteps, which an EDM model does not have.
fn check_edm(
    options: &SamplingOptions,
    source: &LevelSource<'_>,
    sampler: &NamedSampler,
    zero_terminal_snr: bool,
) -> Result<()> {
    let refuse = |field: &str, message: String| Err(Error::invalid(field, message));
    if sampler.sampler.profile().grid == Grid::Distilled {
        let message = format!("must be another than `{}` for a model without numbered timesteps", sampler.name);
        return refuse("sampler_name", message);
    }
    if zero_terminal_snr && options.zero_terminal_snr.is_some() {
        return refuse("zero_terminal_snr", "must be false for a model without numbered timesteps".to_owned());
    }
    if options.prediction_type == Some(Prediction::Sample) {
        return refuse("prediction_type", "must be `epsilon` or `v_prediction` for this model".to_owned());
    }
    match source {
        LevelSource::Timesteps(_) => {
            refuse("timesteps", "must be left out for a model without numbered timesteps: give `sigmas`".to_owned())
        }
        LevelSource::Schedule(NamedSpacing { name, .. }) if !source.is_curve() => {
            refuse("scheduler", format!("must be `karras`, `exponential` or `beta` for this model, got `{name}`"))
        }
        LevelSource::Schedule(_) | LevelSource::Sigmas(_) => Ok(()),
    }
}

/// Refuses more steps than a distilled model was trained on.
fn check_distilled(task: &SpacingTask<'_>, sampler: &str) -> Result<()> {
    let SpacingTask { training, steps, grid, distilled, .. } = task;
    if *grid != Grid::Distilled || *steps <= (*distilled).min(training.sigmas.len()) {
        return Ok(());
    }
    Err(Error::invalid("steps", format!("must be at most {distilled} for `{sampler}`, got {steps}")))
}

/// Refuses noise prediction from pure noise.
fn check_prediction(prediction: Prediction, trajectory: &[Step]) -> Result<()> {
    if prediction != Prediction::Epsilon || trajectory.iter().all(|step| step.at.alpha != 0.0) {
        return Ok(());
    }
    Err(Error::InvalidParameter {
        field: "zero_terminal_snr".to_owned(),
        message: "leaves no signal at the first step, from which noise cannot be predicted".to_owned(),
        hint: Some("set `prediction_type` to `v_prediction`".to_owned()),
    })
}

impl Instructor for SchedulerInstructor {
    type Interface = Scheduler;
    type Resources<'a> = ();

    fn instruct(&self, request: Request, (): (), _ctx: &Context) -> Result<Response> {
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
    let sampler = |(name, sampler): (&'static str, &'static dyn Sampler)| {
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
