//! The plan of a sampling run: the sampler and the noise levels that it goes through.

use std::ops::Range;

use crate::scheduler::config::Prediction;
use crate::scheduler::edm::Edm;

/// A noise level: `x = alpha · x₀ + sigma · ε`.
/// `alpha` is 1 for variance-exploding samplers, and `alpha² + sigma² = 1` for variance-preserving ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    pub alpha: f64,
    pub sigma: f64,
    /// The network's time input: 0 to 999, a real number.
    pub timestep: f64,
}

impl Level {
    /// The variance-preserving level of a k-diffusion σ.
    #[must_use]
    pub fn preserving(sigma: f64, timestep: f64) -> Self {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self { alpha, sigma: sigma * alpha, timestep }
    }

    /// σ / α: k-diffusion's σ. Infinite for pure noise.
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

/// One step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The start, at which the first model call is made.
    pub at: Level,
    /// The level of the second model call; the same as `to` for samplers without one.
    pub midpoint: Level,
    /// The end.
    pub to: Level,
}

impl Step {
    /// The growth of λ = ln(α / σ); infinite for a step that ends at the clean image.
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
    /// Twice a step, but once in a step that ends at σ = 0.
    Two,
    /// Twice in the first step of several, then once.
    TwoAtFirst,
}

/// Everything that a sampler needs, decided.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingPlan {
    /// Its name in `SAMPLERS`.
    pub sampler: &'static str,
    /// Its name in `SPACINGS`, or `sigmas` or `timesteps` for a request with its own.
    pub schedule: &'static str,
    /// k-diffusion's σ at the start of every step, and then at the end of the last.
    pub sigmas: Vec<f64>,
    /// The network's time input at the start of every step.
    pub timesteps: Vec<f64>,
    /// All steps from pure noise to the image.
    pub trajectory: Vec<Step>,
    /// The steps of `trajectory` that are run: all of them unless [`Self::between`] cut it.
    pub run: Range<usize>,
    /// Unit noise times this factor is the sample at the start of the trajectory.
    pub init_scale: f64,
    /// Share of fresh noise, 0 to 1; 0 for samplers without η.
    pub eta: f64,
    pub prediction: Prediction,
    pub zero_terminal_snr: bool,
    /// The preconditioning of a network trained with Karras et al.'s noise.
    pub edm: Option<Edm>,
    /// Number of training timesteps of the checkpoint.
    pub num_train_timesteps: usize,
    pub calls: Calls,
}

impl SamplingPlan {
    /// Number of steps in the run.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.run.len()
    }

    /// Number of model calls in the run.
    #[must_use]
    pub fn evaluations(&self) -> usize {
        let steps = self.steps();
        match self.calls {
            Calls::One => steps,
            Calls::Two => steps + self.run_steps().filter(|(_, step)| step.to.sigma > 0.0).count(),
            Calls::TwoAtFirst => steps + usize::from(self.corrects_first()),
        }
    }

    /// True if a plan of [`Calls::TwoAtFirst`] has a second step, at whose level the first can be corrected.
    #[must_use]
    pub fn corrects_first(&self) -> bool {
        self.run.start + 1 < self.trajectory.len() && !self.run.is_empty()
    }

    /// The steps of the run, with their index in the whole trajectory.
    pub fn run_steps(&self) -> impl Iterator<Item = (usize, &Step)> {
        self.trajectory.iter().enumerate().take(self.run.end).skip(self.run.start)
    }

    /// True for the index of the trajectory's last step.
    #[must_use]
    pub fn is_last(&self, index: usize) -> bool {
        index + 1 == self.trajectory.len()
    }

    /// The level at which the run starts: an image enters it as `alpha · x₀ + sigma · noise`.
    #[must_use]
    pub fn first(&self) -> Level {
        let start = self.trajectory.get(self.run.start).or(self.trajectory.last());
        start.map_or(Level { alpha: 1.0, sigma: 0.0, timestep: 0.0 }, |step| step.at)
    }

    /// Number of steps that denoise the first `share`, 0 to 1, of the training timesteps, counted from the noisiest: the
    /// part of an ensemble's first expert (diffusers' `denoising_end`). Without numbered timesteps, a share of the steps.
    #[must_use]
    pub fn until_share(&self, share: f64) -> usize {
        if self.edm.is_some() {
            return (share * self.trajectory.len() as f64).round() as usize;
        }
        let cutoff = self.cutoff_timestep(share);
        self.timesteps.iter().filter(|timestep| **timestep >= cutoff).count()
    }

    /// Index of the first step after `share`, at which the second expert starts (`denoising_start`).
    #[must_use]
    pub fn from_share(&self, share: f64) -> usize {
        if self.edm.is_some() {
            return self.until_share(share).min(self.trajectory.len());
        }
        let cutoff = self.cutoff_timestep(share);
        self.trajectory.len() - self.timesteps.iter().filter(|timestep| **timestep < cutoff).count()
    }

    fn cutoff_timestep(&self, share: f64) -> f64 {
        let all = self.num_train_timesteps as f64;
        (all - share * all).round_ties_even()
    }

    /// The same plan with only these steps of the trajectory: image to image starts late, a refiner's base ends early.
    #[must_use]
    pub fn between(mut self, run: Range<usize>) -> Self {
        let end = run.end.min(self.trajectory.len());
        self.run = run.start.min(end)..end;
        self
    }
}
