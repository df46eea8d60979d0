//! What a checkpoint says of its noise, the table of σ it was trained on, and the plan of a run.
//!
//! σ is k-diffusion's: `x = x₀ + σ·ε`, so σ² = (1 − ᾱ) / ᾱ with ᾱ the cumulative product of 1 − β (Ho et al. 2020,
//! <https://arxiv.org/abs/2006.11239>). Tables are rounded to f32 where the reference rounds, because 1 − ᾱ at the
//! first timesteps has few digits left; everything after that is f64.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::scheduler::edm::Edm;

/// Where a sample stands on the path from noise to image: `x = alpha · x₀ + sigma · ε`.
/// `alpha` is 1 for samplers that work with k-diffusion's σ, and `alpha² + sigma² = 1` for variance-preserving ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    pub alpha: f64,
    pub sigma: f64,
    /// What the network is told: 0 to 999, a real number.
    pub timestep: f64,
}

impl Level {
    /// The variance-preserving level of a k-diffusion σ.
    #[must_use]
    pub fn preserving(sigma: f64, timestep: f64) -> Self {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self { alpha, sigma: sigma * alpha, timestep }
    }

    /// σ / α: k-diffusion's σ. Infinite where no signal is left.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.sigma / self.alpha
    }

    /// Half the logarithm of the signal-to-noise ratio, ln(α / σ).
    #[must_use]
    pub fn lambda(&self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

/// What the network's output means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise ε.
    #[default]
    Epsilon,
    /// v = α·ε − σ·x₀ (Salimans & Ho 2022).
    #[serde(alias = "v")]
    VPrediction,
    /// x₀ itself.
    Sample,
}

/// How β grows over the training timesteps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    #[default]
    Linear,
    /// Linear in √β.
    ScaledLinear,
    /// ᾱ is a squared cosine, β at most 0.999 (Nichol & Dhariwal 2021).
    SquaredcosCapV2,
}

/// The three ways of choosing timesteps that a checkpoint can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    Leading,
    Trailing,
    Linspace,
}

impl TimestepSpacing {
    /// Its name among the schedules.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Leading => "leading",
            Self::Trailing => "trailing",
            Self::Linspace => "linspace",
        }
    }
}

/// Where the σ of a run end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigmas {
    #[default]
    Zero,
    SigmaMin,
}

/// The content of a checkpoint's `scheduler_config.json`. Keys that are left out take diffusers' defaults; keys that
/// are not listed here do not matter to this worker.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// diffusers' class: the checkpoint's own sampler.
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    pub trained_betas: Option<Vec<f64>>,
    pub prediction_type: Prediction,
    pub timestep_spacing: Option<TimestepSpacing>,
    pub steps_offset: usize,
    pub rescale_betas_zero_snr: Option<bool>,
    pub set_alpha_to_one: Option<bool>,
    pub use_karras_sigmas: Option<bool>,
    pub use_exponential_sigmas: Option<bool>,
    pub use_beta_sigmas: Option<bool>,
    pub final_sigmas_type: FinalSigmas,
    /// `dpmsolver++` or `sde-dpmsolver++`, for the classes that are both.
    pub algorithm_type: Option<String>,
    pub original_inference_steps: usize,
    /// Of Karras et al.'s noise: the lowest and highest σ, the deviation of the data, and how the σ fall.
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
    pub sigma_data: Option<f64>,
    pub sigma_schedule: Option<String>,
    pub rho: Option<f64>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class_name: None,
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            prediction_type: Prediction::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            rescale_betas_zero_snr: None,
            set_alpha_to_one: None,
            use_karras_sigmas: None,
            use_exponential_sigmas: None,
            use_beta_sigmas: None,
            final_sigmas_type: FinalSigmas::Zero,
            algorithm_type: None,
            original_inference_steps: 50,
            sigma_min: None,
            sigma_max: None,
            sigma_data: None,
            sigma_schedule: None,
            rho: None,
        }
    }
}

impl SchedulerConfig {
    /// Whether the network was trained with the noise and the preconditioning of Karras et al. 2022,
    /// <https://arxiv.org/abs/2206.00364>.
    #[must_use]
    pub fn is_edm(&self) -> bool {
        self.class_name.as_deref().is_some_and(|class| class.starts_with("EDM"))
    }

    /// SDXL base 1.0's, for checkpoints that bring none.
    #[must_use]
    pub fn sdxl() -> Self {
        Self {
            class_name: Some("EulerDiscreteScheduler".to_owned()),
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            timestep_spacing: Some(TimestepSpacing::Leading),
            steps_offset: 1,
            set_alpha_to_one: Some(false),
            ..Self::default()
        }
    }
}

/// The σ and ᾱ of the training timesteps, each rounded to f32.
pub struct Training {
    /// ᾱ; exactly 0 at the end with zero terminal SNR.
    pub alphas_cumprod: Vec<f64>,
    /// σ, finite everywhere: with zero terminal SNR the last is that of ᾱ = 2⁻²⁴.
    pub sigmas: Vec<f64>,
    log_sigmas: Vec<f64>,
    /// Of a network without numbered timesteps; the table is then of its ends alone.
    pub edm: Option<Edm>,
}

impl Training {
    /// # Errors
    /// `invalid_parameter` when the checkpoint's numbers give no noise schedule.
    pub fn new(config: &SchedulerConfig, zero_terminal_snr: bool) -> Result<Self> {
        if let Some(edm) = Edm::of(config)? {
            let sigmas = vec![edm.sigma_min, edm.sigma_max];
            let alphas_cumprod = sigmas.iter().map(|sigma| 1.0 / (1.0 + sigma * sigma)).collect();
            let log_sigmas = sigmas.iter().map(|sigma: &f64| sigma.ln()).collect();
            return Ok(Self { alphas_cumprod, sigmas, log_sigmas, edm: Some(edm) });
        }
        let count = config.num_train_timesteps;
        if !(2..=100_000).contains(&count) {
            return Err(unusable(format!("`num_train_timesteps` must be 2 to 100000, got {count}")));
        }
        let mut betas = betas(config);
        if zero_terminal_snr {
            betas = rescaled_to_zero_snr(&betas);
        }
        let alphas_cumprod = cumulative(&betas);
        let usable = |ac: &f32| (0.0..1.0).contains(ac) && (*ac > 0.0 || zero_terminal_snr);
        if alphas_cumprod.len() < 2 || !alphas_cumprod.iter().all(usable) || !alphas_cumprod.is_sorted_by(|a, b| a > b)
        {
            return Err(unusable("its betas do not give a falling noise schedule".to_owned()));
        }
        let mut finite = alphas_cumprod.clone();
        if zero_terminal_snr && let Some(last) = finite.last_mut() {
            *last = 2f32.powi(-24);
        }
        let sigmas: Vec<f32> = finite.iter().map(|ac| ((1.0 - ac) / ac).sqrt()).collect();
        Ok(Self {
            alphas_cumprod: alphas_cumprod.into_iter().map(f64::from).collect(),
            log_sigmas: sigmas.iter().map(|s| f64::from(f64::from(*s).ln() as f32)).collect(),
            sigmas: sigmas.into_iter().map(f64::from).collect(),
            edm: None,
        })
    }

    /// The highest timestep.
    #[must_use]
    pub fn last(&self) -> f64 {
        (self.sigmas.len() - 1) as f64
    }

    #[must_use]
    pub fn sigma_min(&self) -> f64 {
        self.sigmas.first().copied().unwrap_or_default()
    }

    #[must_use]
    pub fn sigma_max(&self) -> f64 {
        self.sigmas.last().copied().unwrap_or_default()
    }

    /// σ at a real timestep, linear between the table's.
    #[must_use]
    pub fn sigma_at(&self, timestep: f64) -> f64 {
        interpolate(&self.sigmas, timestep)
    }

    /// σ at a real timestep, linear in ln σ between the table's, as k-diffusion has it.
    #[must_use]
    pub fn log_sigma_at(&self, timestep: f64) -> f64 {
        interpolate(&self.log_sigmas, timestep).exp()
    }

    /// The real timestep of a σ, linear in ln σ; 0 and the last timestep outside the table.
    #[must_use]
    pub fn timestep_of(&self, sigma: f64) -> f64 {
        if self.edm.is_some() {
            return Edm::timestep_of(sigma);
        }
        let log_sigma = sigma.max(1e-10).ln();
        let below = self.log_sigmas.partition_point(|known| *known <= log_sigma).saturating_sub(1);
        let below = below.min(self.log_sigmas.len() - 2);
        let (low, high) = (self.log_sigmas[below], self.log_sigmas[below + 1]);
        let part = ((low - log_sigma) / (low - high)).clamp(0.0, 1.0);
        (1.0 - part) * below as f64 + part * (below + 1) as f64
    }

    /// The variance-preserving level of a whole timestep; `None` outside the table.
    #[must_use]
    pub fn level(&self, timestep: f64) -> Option<Level> {
        if timestep < 0.0 || timestep.fract() != 0.0 || self.edm.is_some() {
            return None;
        }
        let ac = *self.alphas_cumprod.get(timestep as usize)?;
        Some(Level { alpha: ac.sqrt(), sigma: (1.0 - ac).sqrt(), timestep })
    }
}

/// One step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Where the step starts, and where its first model call is made.
    pub at: Level,
    /// Where its second model call is made, by samplers that make one; otherwise the same as `to`.
    pub middle: Level,
    /// Where it lands.
    pub to: Level,
}

impl Step {
    /// How far λ = ln(α / σ) grows; infinite for a step that lands at the image.
    #[must_use]
    pub fn span(&self) -> f64 {
        self.to.lambda() - self.at.lambda()
    }
}

/// How often a sampler calls the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// Once a step.
    One,
    /// Twice a step, once in a step that lands at σ = 0.
    Two,
    /// Twice in the first step of several, then once.
    TwoAtFirst,
}

/// Everything a sampler needs to know, decided.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingPlan {
    /// Its name in `SAMPLERS`.
    pub sampler: &'static str,
    /// Its name in `SPACINGS`, or `sigmas` or `timesteps` when the request brought its own.
    pub schedule: &'static str,
    /// k-diffusion's σ of every step and, last, of where the run ends.
    pub sigmas: Vec<f64>,
    /// What the network is told at the start of every step.
    pub timesteps: Vec<f64>,
    pub path: Vec<Step>,
    /// The part of `path` that is walked; all of it unless [`Self::between`] cut it.
    pub run: Range<usize>,
    /// Unit noise times this is the sample at the first step of the whole path.
    pub init_scale: f64,
    /// Share of fresh noise, 0 to 1; 0 where the sampler has no such choice.
    pub eta: f64,
    pub prediction: Prediction,
    pub zero_terminal_snr: bool,
    /// For a network of Karras et al.'s preconditioning.
    pub edm: Option<Edm>,
    /// How many timesteps the checkpoint was trained with.
    pub num_train_timesteps: usize,
    pub calls: Calls,
}

impl SamplingPlan {
    /// How many steps will be walked.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.run.len()
    }

    /// How many model calls the sampler will make.
    #[must_use]
    pub fn evaluations(&self) -> usize {
        let steps = self.steps();
        match self.calls {
            Calls::One => steps,
            Calls::Two => steps + self.walk().filter(|(_, step)| step.to.sigma > 0.0).count(),
            Calls::TwoAtFirst => steps + usize::from(self.corrects_first()),
        }
    }

    /// Whether a plan of [`Calls::TwoAtFirst`] has a second step whose level the first can be corrected at.
    #[must_use]
    pub fn corrects_first(&self) -> bool {
        self.run.start + 1 < self.path.len() && !self.run.is_empty()
    }

    /// The steps to walk, with their index in the whole path.
    pub fn walk(&self) -> impl Iterator<Item = (usize, &Step)> {
        self.path.iter().enumerate().take(self.run.end).skip(self.run.start)
    }

    /// The level at which the run starts: an image enters it as `alpha · x₀ + sigma · noise`.
    #[must_use]
    pub fn first(&self) -> Level {
        let start = self.path.get(self.run.start).or(self.path.last());
        start.map_or(Level { alpha: 1.0, sigma: 0.0, timestep: 0.0 }, |step| step.at)
    }

    /// Steps before `share`, 0 to 1, of the training timesteps is denoised, from the noisiest: where an ensemble's first
    /// expert ends (diffusers' `denoising_end`). Without numbered timesteps it is a share of the steps.
    #[must_use]
    pub fn until_share(&self, share: f64) -> usize {
        if self.edm.is_some() {
            return (share * self.path.len() as f64).round() as usize;
        }
        let cut = self.cut_at(share);
        self.timesteps.iter().filter(|timestep| **timestep >= cut).count()
    }

    /// The first step from `share` on: where the second expert starts (`denoising_start`).
    #[must_use]
    pub fn from_share(&self, share: f64) -> usize {
        if self.edm.is_some() {
            return self.until_share(share).min(self.path.len());
        }
        let cut = self.cut_at(share);
        self.path.len() - self.timesteps.iter().filter(|timestep| **timestep < cut).count()
    }

    fn cut_at(&self, share: f64) -> f64 {
        let all = self.num_train_timesteps as f64;
        (all - share * all).round_ties_even()
    }

    /// The same plan, walking only these steps of the path: image to image starts late, a refiner's base ends early.
    #[must_use]
    pub fn between(mut self, run: Range<usize>) -> Self {
        let end = run.end.min(self.path.len());
        self.run = run.start.min(end)..end;
        self
    }
}

/// Linear between the entries of a table, constant outside.
fn interpolate(table: &[f64], at: f64) -> f64 {
    let last = table.len() - 1;
    let at = at.clamp(0.0, last as f64);
    let below = (at as usize).min(last.saturating_sub(1));
    let (a, b) = (table[below], table[(below + 1).min(last)]);
    (b - a) * (at - below as f64) + a
}

fn betas(config: &SchedulerConfig) -> Vec<f32> {
    let count = config.num_train_timesteps;
    if let Some(betas) = &config.trained_betas {
        return betas.iter().map(|b| *b as f32).collect();
    }
    match config.beta_schedule {
        BetaSchedule::Linear => linspace(config.beta_start, config.beta_end, count),
        BetaSchedule::ScaledLinear => {
            linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), count).into_iter().map(|b| b * b).collect()
        }
        BetaSchedule::SquaredcosCapV2 => {
            let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
            let beta = |i: usize| 1.0 - bar((i + 1) as f64 / count as f64) / bar(i as f64 / count as f64);
            (0..count).map(|i| beta(i).min(0.999) as f32).collect()
        }
    }
}

/// Evenly spaced f32 as torch makes them: from both ends towards the middle, multiplied and added in one rounding.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    let at = |i: usize| match i < count / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((count - i - 1) as f32, end),
    };
    (0..count).map(at).collect()
}

/// ᾱ: products in f64, each rounded to f32.
fn cumulative(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    let mut next = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(&mut next).collect()
}

/// Betas whose last ᾱ is 0 and whose first is unchanged: Lin et al. 2023, algorithm 1,
/// <https://arxiv.org/abs/2305.08891>
fn rescaled_to_zero_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative(betas).into_iter().map(f32::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return Vec::new() };
    let scale = first / (first - last);
    let bars = roots.into_iter().map(|root| ((root - last) * scale).powi(2));
    let mut before = 1.0;
    bars.map(|bar| 1.0 - bar / std::mem::replace(&mut before, bar)).collect()
}

fn unusable(message: String) -> Error {
    Error::ModelUnsupported { name: "scheduler_config.json".to_owned(), message }
}
