//! Schedules: each chooses the σ and timesteps of a run from the training schedule.

use crate::registry::Registry;
use crate::scheduler::config::TimestepSpacing;
use crate::scheduler::sampler::{Grid, Parameterization};
use crate::scheduler::schedule::NoiseSchedule;

/// The input of a schedule.
pub struct SpacingTask<'a> {
    pub training: &'a NoiseSchedule,
    /// Number of steps, 1 or more.
    pub steps: usize,
    pub grid: Grid,
    /// The checkpoint's own spacing, from which k-diffusion samplers take the ends of Karras and other curves.
    pub base: TimestepSpacing,
    /// Added to `leading` timesteps.
    pub offset: usize,
    /// Number of timesteps that a distilled model was trained on.
    pub distilled: usize,
}

/// σ and timestep at the start of every step.
pub struct LevelTable {
    pub sigmas: Vec<f64>,
    pub timesteps: Vec<f64>,
}

/// One schedule.
pub struct Spacing {
    /// The usual name: AUTOMATIC1111's if it has one.
    pub label: &'static str,
    /// One sentence for `scheduler.list`.
    pub about: &'static str,
    pub aliases: &'static [&'static str],
    /// Set for the three schedules that take training timesteps by a stride.
    pub strides: Option<TimestepSpacing>,
    /// True if σ follows a curve from highest to lowest, and the timesteps follow from σ.
    pub curve: bool,
    pub table: fn(&SpacingTask<'_>) -> LevelTable,
}

pub static SPACINGS: Registry<Spacing> = Registry::new(
    "schedule",
    &[
        (
            "leading",
            &Spacing {
                label: "Leading",
                about: "Every k-th timestep, counted from the lowest",
                aliases: &["ddim", "ddim_uniform"],
                strides: Some(TimestepSpacing::Leading),
                curve: false,
                table: |task| at_timesteps(task, strided(task, TimestepSpacing::Leading)),
            },
        ),
        (
            "trailing",
            &Spacing {
                label: "Trailing",
                about: "Every k-th timestep, counted from the highest",
                aliases: &[],
                strides: Some(TimestepSpacing::Trailing),
                curve: false,
                table: |task| at_timesteps(task, strided(task, TimestepSpacing::Trailing)),
            },
        ),
        (
            "linspace",
            &Spacing {
                label: "Normal",
                about: "Timesteps evenly from the highest to the lowest",
                aliases: &["uniform"],
                strides: Some(TimestepSpacing::Linspace),
                curve: false,
                table: |task| at_timesteps(task, strided(task, TimestepSpacing::Linspace)),
            },
        ),
        (
            "karras",
            &Spacing {
                label: "Karras",
                about: "Evenly in the seventh root of sigma (Karras et al. 2022, equation 5)",
                aliases: &[],
                strides: None,
                curve: true,
                table: |task| between(task, karras),
            },
        ),
        (
            "exponential",
            &Spacing {
                label: "Exponential",
                about: "Evenly in the logarithm of sigma",
                aliases: &[],
                strides: None,
                curve: true,
                table: |task| between(task, |max, min, part| (max.ln() + part * (min.ln() - max.ln())).exp()),
            },
        ),
        (
            "beta",
            &Spacing {
                label: "Beta",
                about: "By the quantiles of the beta(0.6, 0.6) distribution (Lee et al. 2024)",
                aliases: &[],
                strides: None,
                curve: true,
                table: |task| between(task, |max, min, part| min + beta_quantile(1.0 - part) * (max - min)),
            },
        ),
        (
            "sgm_uniform",
            &Spacing {
                label: "SGM Uniform",
                about: "Timesteps evenly from the highest to above the lowest",
                aliases: &[],
                strides: None,
                curve: false,
                table: sgm_uniform,
            },
        ),
        (
            "simple",
            &Spacing {
                label: "Simple",
                about: "Every k-th sigma of training",
                aliases: &[],
                strides: None,
                curve: false,
                table: simple,
            },
        ),
        (
            "align_your_steps",
            &Spacing {
                label: "Align Your Steps",
                about: "Optimised for SDXL (Sabour et al. 2024)",
                aliases: &["ays"],
                strides: None,
                curve: false,
                table: align_your_steps,
            },
        ),
    ],
);

/// σ at given timesteps, interpolated linearly in the training schedule.
pub(crate) fn at_timesteps(task: &SpacingTask<'_>, timesteps: Vec<f64>) -> LevelTable {
    LevelTable { sigmas: timesteps.iter().map(|t| task.training.sigma_at(*t)).collect(), timesteps }
}

/// Given σ with their timesteps.
pub(crate) fn at_sigmas(task: &SpacingTask<'_>, sigmas: Vec<f64>) -> LevelTable {
    LevelTable { timesteps: sigmas.iter().map(|s| task.training.timestep_of(*s)).collect(), sigmas }
}

fn strided(task: &SpacingTask<'_>, spacing: TimestepSpacing) -> Vec<f64> {
    let (n, last) = (task.steps, task.training.last());
    let count = task.training.sigmas.len();
    if task.grid == Grid::Distilled {
        // Training covered every (count / distilled)-th timestep; take n of those, from the highest on.
        let (known, stride) = (task.distilled, count / task.distilled.max(1));
        let part = known as f64 / n as f64;
        return (0..n).map(|i| ((known - (i as f64 * part) as usize) * stride) as f64 - 1.0).collect();
    }
    let padded = usize::from(task.grid == Grid::Padded);
    let exploding = task.grid.parameterization() == Parameterization::VarianceExploding;
    match spacing {
        TimestepSpacing::Leading => {
            let stride = count / (n + padded);
            (padded..n + padded).rev().map(|i| (i * stride + task.offset) as f64).collect()
        }
        TimestepSpacing::Linspace => {
            let step = if n + padded > 1 { last / (n + padded - 1) as f64 } else { 0.0 };
            let at = |i: usize| if i > 0 && i == n + padded - 1 { last } else { i as f64 * step };
            let round = |t: f64| if exploding { f64::from(t as f32) } else { t.round_ties_even() };
            (padded..n + padded).rev().map(|i| round(at(i))).collect()
        }
        TimestepSpacing::Trailing => {
            let stride = (count as f64 - count as f64 / n as f64) - count as f64;
            (0..n).map(|i| (count as f64 + i as f64 * stride).round_ties_even() - 1.0).collect()
        }
    }
}

/// σ from highest to lowest along a curve over 0..=1, with their timesteps.
fn between(task: &SpacingTask<'_>, curve: impl Fn(f64, f64, f64) -> f64 + Copy + 'static) -> LevelTable {
    let training = task.training;
    let (max, min) = match task.grid.parameterization() {
        Parameterization::VarianceExploding if training.edm.is_none() => {
            let sigmas = at_timesteps(task, strided(task, task.base)).sigmas;
            let end = |sigma: Option<&f64>| sigma.copied().unwrap_or_default();
            (end(sigmas.first()), end(sigmas.last()))
        }
        _ => (training.sigma_max(), training.sigma_min()),
    };
    let step = if task.steps > 1 { 1.0 / (task.steps - 1) as f64 } else { 0.0 };
    let part = |i: usize| if i > 0 && i == task.steps - 1 { 1.0 } else { i as f64 * step };
    at_sigmas(task, (0..task.steps).map(|i| curve(max, min, part(i))).collect())
}

const RHO: f64 = 7.0;

fn karras(max: f64, min: f64, part: f64) -> f64 {
    let (from, to) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
    (from + part * (to - from)).powf(RHO)
}

/// k-diffusion's σ at n of n + 1 evenly spaced timesteps, as in Stability's generative-models (SGM).
fn sgm_uniform(task: &SpacingTask<'_>) -> LevelTable {
    let last = task.training.last();
    let timesteps: Vec<f64> = (0..task.steps).map(|i| last - last * i as f64 / task.steps as f64).collect();
    LevelTable { sigmas: timesteps.iter().map(|t| task.training.log_sigma_at(*t)).collect(), timesteps }
}

fn simple(task: &SpacingTask<'_>) -> LevelTable {
    let stride = task.training.sigmas.len() as f64 / task.steps as f64;
    let timesteps = (0..task.steps).map(|i| task.training.last() - (i as f64 * stride).floor()).collect();
    at_timesteps(task, timesteps)
}

/// The ten SDXL timesteps of Sabour et al. 2024, <https://arxiv.org/abs/2404.14507>. Other numbers of steps interpolate
/// their σ linearly in ln σ.
const ALIGNED: [f64; 10] = [999.0, 845.0, 730.0, 587.0, 443.0, 310.0, 193.0, 116.0, 53.0, 13.0];

fn align_your_steps(task: &SpacingTask<'_>) -> LevelTable {
    // The list assumes a thousand training timesteps.
    let scale = task.training.last() / 999.0;
    let aligned = ALIGNED.iter().map(|t| (t * scale).round()).collect();
    let ten = at_timesteps(task, aligned);
    if task.steps == ALIGNED.len() {
        return ten;
    }
    let step = if task.steps > 1 { (ALIGNED.len() - 1) as f64 / (task.steps - 1) as f64 } else { 0.0 };
    let sigma = |i: usize| {
        let at = (i as f64 * step).min((ALIGNED.len() - 1) as f64);
        let below = (at as usize).min(ALIGNED.len() - 2);
        let (a, b) = (ten.sigmas[below].ln(), ten.sigmas[below + 1].ln());
        (a + (at - below as f64) * (b - a)).exp()
    };
    at_sigmas(task, (0..task.steps).map(sigma).collect())
}

/// Both parameters of the beta schedule's distribution.
const SHAPE: f64 = 0.6;

/// The inverse of the regularised incomplete beta function with both parameters [`SHAPE`].
fn beta_quantile(p: f64) -> f64 {
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    // Half of the distribution lies below ½, so the series there gives the normalisation.
    let target = p * 2.0 * incomplete_beta(0.5);
    let (mut low, mut high) = (0.0, 0.5);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        match incomplete_beta(middle) < target {
            true => low = middle,
            false => high = middle,
        }
    }
    if p <= 0.0 { 0.0 } else { 0.5 * (low + high) }
}

/// ∫₀ˣ tᵃ⁻¹ (1 − t)ᵃ⁻¹ dt for x up to ½ and a = [`SHAPE`]: the binomial series of the second factor, term by term.
fn incomplete_beta(x: f64) -> f64 {
    let (mut power, mut sum) = (1.0, 0.0);
    for k in 0..60 {
        let k = f64::from(k);
        sum += power / (SHAPE + k);
        power *= x * (k + 1.0 - SHAPE) / (k + 1.0);
    }
    sum * x.powf(SHAPE)
}
