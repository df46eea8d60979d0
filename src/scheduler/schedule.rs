//! The noise schedule that a checkpoint was trained on: σ of every training timestep.
//!
//! σ is k-diffusion's: `x = x₀ + σ·ε`, so σ² = (1 − ᾱ) / ᾱ with ᾱ the cumulative product of 1 − β (Ho et al. 2020,
//! <https://arxiv.org/abs/2006.11239>). Tables are rounded to f32 where the reference rounds, because 1 − ᾱ at the
//! first timesteps has few digits left; everything after that is f64.

use crate::error::{Error, Result};
use crate::scheduler::config::{BetaSchedule, SchedulerConfig};
use crate::scheduler::edm::Edm;
use crate::scheduler::plan::Level;

/// The σ and ᾱ of the training timesteps, each rounded to f32.
pub struct NoiseSchedule {
    /// ᾱ; exactly 0 at the end with zero terminal SNR.
    pub alphas_cumprod: Vec<f64>,
    /// σ, finite everywhere: with zero terminal SNR the last is that of ᾱ = 2⁻²⁴.
    pub sigmas: Vec<f64>,
    log_sigmas: Vec<f64>,
    /// Set for a network without numbered timesteps; the table then holds only the lowest and highest σ.
    pub edm: Option<Edm>,
}

impl NoiseSchedule {
    /// # Errors
    /// `model_unsupported` if the checkpoint's parameters give no falling noise schedule.
    pub fn new(config: &SchedulerConfig, zero_terminal_snr: bool) -> Result<Self> {
        if let Some(edm) = Edm::from_config(config)? {
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
        let alphas_cumprod = alphas_cumprod(&betas);
        let usable = |ac: &f32| (0.0..1.0).contains(ac) && (*ac > 0.0 || zero_terminal_snr);
        if alphas_cumprod.len() < 2 || !alphas_cumprod.iter().all(usable) || !alphas_cumprod.is_sorted_by(|a, b| a > b)
        {
            return Err(unusable("its betas give no falling noise schedule".to_owned()));
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

    /// σ at a real timestep, interpolated linearly.
    #[must_use]
    pub fn sigma_at(&self, timestep: f64) -> f64 {
        interpolate(&self.sigmas, timestep)
    }

    /// σ at a real timestep, interpolated linearly in ln σ, as k-diffusion does.
    #[must_use]
    pub fn log_sigma_at(&self, timestep: f64) -> f64 {
        interpolate(&self.log_sigmas, timestep).exp()
    }

    /// The real timestep of a σ, interpolated linearly in ln σ and clamped to the table.
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

    /// The variance-preserving level of an integer timestep; `None` outside the table.
    #[must_use]
    pub fn level(&self, timestep: f64) -> Option<Level> {
        if timestep < 0.0 || timestep.fract() != 0.0 || self.edm.is_some() {
            return None;
        }
        let ac = *self.alphas_cumprod.get(timestep as usize)?;
        Some(Level { alpha: ac.sqrt(), sigma: (1.0 - ac).sqrt(), timestep })
    }
}

/// Interpolates linearly between the entries of a table; constant outside.
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

/// `torch.linspace` in f32: from both ends towards the middle, with fused multiply-add.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    let at = |i: usize| match i < count / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((count - i - 1) as f32, end),
    };
    (0..count).map(at).collect()
}

/// ᾱ: the cumulative product in f64, each entry rounded to f32.
fn alphas_cumprod(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    let mut next = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(&mut next).collect()
}

/// Rescales betas so that the last ᾱ is 0 and the first is unchanged: Lin et al. 2023, algorithm 1,
/// <https://arxiv.org/abs/2305.08891>
fn rescaled_to_zero_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = alphas_cumprod(betas).into_iter().map(f32::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return Vec::new() };
    let scale = first / (first - last);
    let bars = roots.into_iter().map(|root| ((root - last) * scale).powi(2));
    let mut before = 1.0;
    bars.map(|bar| 1.0 - bar / std::mem::replace(&mut before, bar)).collect()
}

fn unusable(message: String) -> Error {
    Error::ModelUnsupported { name: "scheduler_config.json".to_owned(), message }
}
