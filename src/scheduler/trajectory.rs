//! Builds the steps of a sampling run from a schedule's table of σ and timesteps.

use crate::scheduler::config::{FinalSigmas, SchedulerConfig};
use crate::scheduler::plan::{Level, Step};
use crate::scheduler::sampler::{End, Grid, Midpoint, Parameterization, Profile, ancestral};
use crate::scheduler::schedule::NoiseSchedule;
use crate::scheduler::workers::spacing::LevelTable;

pub(crate) struct TrajectoryBuilder<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) config: &'a SchedulerConfig,
    pub(crate) training: &'a NoiseSchedule,
    /// True if the table's timesteps descend by a constant stride.
    pub(crate) strided: bool,
    /// The σ at which the request ends the run.
    pub(crate) sigma_end: Option<f64>,
    pub(crate) eta: f64,
}

impl TrajectoryBuilder<'_> {
    /// One step for each entry of the table.
    pub(crate) fn build(&self, table: &LevelTable) -> Vec<Step> {
        let levels: Vec<Level> = table.sigmas.iter().zip(&table.timesteps).map(|(s, t)| self.level(*s, *t)).collect();
        let end = self.end(table);
        let constant = self.strided && self.profile.end == End::FirstAlpha;
        let stride = (self.training.sigmas.len() / levels.len().max(1)) as f64;
        let target = |i: usize| match levels.get(i + 1) {
            _ if constant => self.training_level(levels[i].timestep - stride).unwrap_or(end),
            Some(next) => *next,
            None => end,
        };
        let step = |i: usize| {
            let (at, to) = (levels[i], target(i));
            Step { at, midpoint: self.midpoint(at, to, levels.get(i + 1), stride), to }
        };
        (0..levels.len()).map(step).collect()
    }

    fn level(&self, sigma: f64, timestep: f64) -> Level {
        match self.profile.grid {
            Grid::Continuous | Grid::ContinuousRounded => Level { alpha: 1.0, sigma, timestep },
            Grid::Padded => Level::preserving(sigma, timestep),
            Grid::Discrete | Grid::Distilled => {
                // A σ of the training table takes its level from there, so that ᾱ = 0 stays exact.
                let is_training = (self.training.sigma_at(timestep) / sigma - 1.0).abs() < 1e-6;
                let level = self.training_level(timestep).filter(|_| is_training);
                level.unwrap_or(Level::preserving(sigma, timestep))
            }
        }
    }

    /// The level of an integer timestep of training.
    fn training_level(&self, timestep: f64) -> Option<Level> {
        let level = self.training.level(timestep)?;
        // PNDM divides by α.
        let divides = self.profile.midpoint == Midpoint::PndmWarmup && level.alpha == 0.0;
        Some(if divides { Level::preserving(self.training.sigma_at(timestep), timestep) } else { level })
    }

    /// The level at which the last step ends.
    fn end(&self, table: &LevelTable) -> Level {
        let at = |sigma: f64| match self.profile.grid.parameterization() {
            Parameterization::VarianceExploding => Level { alpha: 1.0, sigma, timestep: 0.0 },
            Parameterization::VariancePreserving => Level::preserving(sigma, 0.0),
        };
        if let Some(sigma) = self.sigma_end {
            return at(sigma);
        }
        let first = || self.training.level(0.0).unwrap_or(at(0.0));
        let lowest = self.training.sigma_min();
        match self.profile.end {
            End::Image => at(0.0),
            End::Checkpoint => match self.config.final_sigmas_type {
                FinalSigmas::Zero => at(0.0),
                FinalSigmas::SigmaMin => at(lowest),
            },
            // A table that reaches the lowest σ cannot go below it.
            End::SigmaMin => at(table.sigmas.last().map_or(lowest, |last| lowest.min(*last))),
            End::FirstAlpha => match self.config.set_alpha_to_one {
                Some(true) => at(0.0),
                None if self.config.class_name.as_deref() == Some("DDIMScheduler") => at(0.0),
                Some(false) | None => first(),
            },
            End::FirstTimestep => first(),
        }
    }

    fn midpoint(&self, at: Level, to: Level, next: Option<&Level>, stride: f64) -> Level {
        let exploding = |sigma: f64| Level { alpha: 1.0, sigma, timestep: self.training.timestep_of(sigma) };
        match self.profile.midpoint {
            Midpoint::Endpoint => to,
            _ if to.sigma == 0.0 => to,
            Midpoint::Geometric => exploding((at.sigma * to.sigma).sqrt()),
            Midpoint::Ancestral => exploding((at.sigma * ancestral(at.sigma, to.sigma, self.eta).0).sqrt()),
            Midpoint::PndmWarmup => match next {
                Some(next) if self.strided => self.training_level(next.timestep + stride).unwrap_or(at),
                _ => at,
            },
            Midpoint::BeforeRenoising => self.training_level(((1.0 - self.eta) * to.timestep).floor()).unwrap_or(to),
        }
    }
}
