//! Schedules: how the σ and timesteps of a run are chosen from those of training.

use crate::registry::Registry;
use crate::scheduler::schedule::{TimestepSpacing, Training};
use crate::scheduler::workers::Grid;

/// What a schedule is asked for.
pub struct Ask<'a> {
    pub training: &'a Training,
    /// Number of steps, 1 or more.
    pub steps: usize,
    pub grid: Grid,
    /// The checkpoint's own spacing: k-diffusion samplers take the ends of Karras and other σ from it.
    pub base: TimestepSpacing,
    /// Added to `leading` timesteps.
    pub offset: usize,
    /// How many timesteps a distilled model knows.
    pub distilled: usize,
}

/// σ and timestep at the start of every step.
pub struct Table {
    pub sigmas: Vec<f64>,
    pub timesteps: Vec<f64>,
}

/// One way of choosing σ.
pub struct Spacing {
    /// The name people know, AUTOMATIC1111's where it has one.
    pub label: &'static str,
    /// One sentence for `scheduler.list`.
    pub about: &'static str,
    pub aliases: &'static [&'static str],
    /// `Some` for the three that choose among the training timesteps by a stride.
    pub strides: Option<TimestepSpacing>,
    /// Whether σ are a curve from the highest to the lowest, and the timesteps follow from them.
    pub curve: bool,
    pub table: fn(&Ask<'_>) -> Table,
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
                table: |ask| at_timesteps(ask, strided(ask, TimestepSpacing::Leading)),
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
                table: |ask| at_timesteps(ask, strided(ask, TimestepSpacing::Trailing)),
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
                table: |ask| at_timesteps(ask, strided(ask, TimestepSpacing::Linspace)),
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
                table: |ask| between(ask, karras),
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
                table: |ask| between(ask, |max, min, part| (max.ln() + part * (min.ln() - max.ln())).exp()),
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
                table: |ask| between(ask, |max, min, part| min + beta_quantile(1.0 - part) * (max - min)),
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

/// σ at given timesteps, linear between those of training.
pub(crate) fn at_timesteps(ask: &Ask<'_>, timesteps: Vec<f64>) -> Table {
    Table { sigmas: timesteps.iter().map(|t| ask.training.sigma_at(*t)).collect(), timesteps }
}

/// Given σ, and the timesteps to which they belong.
pub(crate) fn at_sigmas(ask: &Ask<'_>, sigmas: Vec<f64>) -> Table {
    Table { timesteps: sigmas.iter().map(|s| ask.training.timestep_of(*s)).collect(), sigmas }
}

fn strided(ask: &Ask<'_>, spacing: TimestepSpacing) -> Vec<f64> {
    let (n, last) = (ask.steps, ask.training.last());
    let count = ask.training.sigmas.len();
    if ask.grid == Grid::Distilled {
        // Every (count / distilled)-th timestep was learned; of those, n from the highest on.
        let (known, stride) = (ask.distilled, count / ask.distilled.max(1));
        let part = known as f64 / n as f64;
        return (0..n).map(|i| ((known - (i as f64 * part) as usize) * stride) as f64 - 1.0).collect();
    }
    let padded = usize::from(ask.grid == Grid::Padded);
    let real = matches!(ask.grid, Grid::Real | Grid::RealRounded);
    match spacing {
        TimestepSpacing::Leading => {
            let stride = count / (n + padded);
            (padded..n + padded).rev().map(|i| (i * stride + ask.offset) as f64).collect()
        }
        TimestepSpacing::Linspace => {
            let step = if n + padded > 1 { last / (n + padded - 1) as f64 } else { 0.0 };
            let at = |i: usize| if i > 0 && i == n + padded - 1 { last } else { i as f64 * step };
            let round = |t: f64| if real { f64::from(t as f32) } else { t.round_ties_even() };
            (padded..n + padded).rev().map(|i| round(at(i))).collect()
        }
        TimestepSpacing::Trailing => {
            let stride = (count as f64 - count as f64 / n as f64) - count as f64;
            (0..n).map(|i| (count as f64 + i as f64 * stride).round_ties_even() - 1.0).collect()
        }
    }
}

/// σ between the highest and the lowest by a curve over 0..=1, and the timesteps as the grid has them.
fn between(ask: &Ask<'_>, curve: impl Fn(f64, f64, f64) -> f64 + Copy + 'static) -> Table {
    let training = ask.training;
    let (max, min) = match ask.grid {
        _ if training.edm.is_some() => (training.sigma_max(), training.sigma_min()),
        Grid::Real | Grid::RealRounded => {
            let ends = at_timesteps(ask, strided(ask, ask.base)).sigmas;
            let end = |sigma: Option<&f64>| sigma.copied().unwrap_or_default();
            (end(ends.first()), end(ends.last()))
        }
        Grid::Whole | Grid::Distilled | Grid::Padded => (training.sigma_max(), training.sigma_min()),
    };
    let step = if ask.steps > 1 { 1.0 / (ask.steps - 1) as f64 } else { 0.0 };
    let part = |i: usize| if i > 0 && i == ask.steps - 1 { 1.0 } else { i as f64 * step };
    at_sigmas(ask, (0..ask.steps).map(|i| curve(max, min, part(i))).collect())
}

const RHO: f64 = 7.0;

fn karras(max: f64, min: f64, part: f64) -> f64 {
    let (from, to) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
    (from + part * (to - from)).powf(RHO)
}

/// k-diffusion's σ at n of n + 1 even timesteps, as generative-models (SGM) has them.
fn sgm_uniform(ask: &Ask<'_>) -> Table {
    let last = ask.training.last();
    let timesteps: Vec<f64> = (0..ask.steps).map(|i| last - last * i as f64 / ask.steps as f64).collect();
    Table { sigmas: timesteps.iter().map(|t| ask.training.log_sigma_at(*t)).collect(), timesteps }
}

fn simple(ask: &Ask<'_>) -> Table {
    let stride = ask.training.sigmas.len() as f64 / ask.steps as f64;
    let timesteps = (0..ask.steps).map(|i| ask.training.last() - (i as f64 * stride).floor()).collect();
    at_timesteps(ask, timesteps)
}

/// The ten timesteps for SDXL of Sabour et al. 2024, <https://arxiv.org/abs/2404.14507>; their σ are interpolated
/// linearly in ln σ for other numbers of steps.
const ALIGNED: [f64; 10] = [999.0, 845.0, 730.0, 587.0, 443.0, 310.0, 193.0, 116.0, 53.0, 13.0];

fn align_your_steps(ask: &Ask<'_>) -> Table {
    // The list is of a thousand timesteps; other tables are scaled to it.
    let scale = ask.training.last() / 999.0;
    let aligned = ALIGNED.iter().map(|t| (t * scale).round()).collect();
    let ten = at_timesteps(ask, aligned);
    if ask.steps == ALIGNED.len() {
        return ten;
    }
    let step = if ask.steps > 1 { (ALIGNED.len() - 1) as f64 / (ask.steps - 1) as f64 } else { 0.0 };
    let sigma = |i: usize| {
        let at = (i as f64 * step).min((ALIGNED.len() - 1) as f64);
        let below = (at as usize).min(ALIGNED.len() - 2);
        let (a, b) = (ten.sigmas[below].ln(), ten.sigmas[below + 1].ln());
        (a + (at - below as f64) * (b - a)).exp()
    };
    at_sigmas(ask, (0..ask.steps).map(sigma).collect())
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
