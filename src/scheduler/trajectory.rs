//! From a schedule's table to the path that a sampler walks.

use crate::scheduler::schedule::{FinalSigmas, Level, SchedulerConfig, Step, Training};
use crate::scheduler::workers::spacing::Table;
use crate::scheduler::workers::{End, Grid, Middle, Profile, ancestral};

/// What a path is made of.
pub(crate) struct Terrain<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) config: &'a SchedulerConfig,
    pub(crate) training: &'a Training,
    /// The table's timesteps descend by a constant stride.
    pub(crate) strides: bool,
    /// The σ at which the request itself says that the run ends.
    pub(crate) end: Option<f64>,
    pub(crate) eta: f64,
}

impl Terrain<'_> {
    /// One step for each entry of the table.
    pub(crate) fn path(&self, table: &Table) -> Vec<Step> {
        let levels: Vec<Level> = table.sigmas.iter().zip(&table.timesteps).map(|(s, t)| self.level(*s, *t)).collect();
        let end = self.end(table);
        let constant = self.strides && self.profile.end == End::FirstAlpha;
        let stride = (self.training.sigmas.len() / levels.len().max(1)) as f64;
        let landing = |i: usize| match levels.get(i + 1) {
            _ if constant => self.whole(levels[i].timestep - stride).unwrap_or(end),
            Some(next) => *next,
            None => end,
        };
        let step = |i: usize| {
            let (at, to) = (levels[i], landing(i));
            Step { at, middle: self.middle(at, to, levels.get(i + 1), stride), to }
        };
        (0..levels.len()).map(step).collect()
    }

    fn level(&self, sigma: f64, timestep: f64) -> Level {
        match self.profile.grid {
            Grid::Real | Grid::RealRounded => Level { alpha: 1.0, sigma, timestep },
            Grid::Padded => Level::preserving(sigma, timestep),
            Grid::Whole | Grid::Distilled => {
                // A σ that lies on the table is the table's, with ᾱ = 0 kept.
                let on_table =
                    self.whole(timestep).filter(|_| (self.training.sigma_at(timestep) / sigma - 1.0).abs() < 1e-6);
                on_table.unwrap_or(Level::preserving(sigma, timestep))
            }
        }
    }

    /// The level of a whole timestep of training.
    fn whole(&self, timestep: f64) -> Option<Level> {
        let level = self.training.level(timestep)?;
        // PNDM divides by α.
        let divides = self.profile.middle == Middle::Raised && level.alpha == 0.0;
        Some(if divides { Level::preserving(self.training.sigma_at(timestep), timestep) } else { level })
    }

    /// Where the last step lands.
    fn end(&self, table: &Table) -> Level {
        let at = |sigma: f64| match self.profile.grid {
            Grid::Real | Grid::RealRounded => Level { alpha: 1.0, sigma, timestep: 0.0 },
            Grid::Whole | Grid::Distilled | Grid::Padded => Level::preserving(sigma, 0.0),
        };
        if let Some(sigma) = self.end {
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
            // A table that goes down to the lowest σ has nowhere to go from there.
            End::SigmaMin => at(table.sigmas.last().map_or(lowest, |last| lowest.min(*last))),
            End::FirstAlpha => match self.config.set_alpha_to_one {
                Some(true) => at(0.0),
                None if self.config.class_name.as_deref() == Some("DDIMScheduler") => at(0.0),
                Some(false) | None => first(),
            },
            End::FirstTimestep => first(),
        }
    }

    fn middle(&self, at: Level, to: Level, next: Option<&Level>, stride: f64) -> Level {
        let real = |sigma: f64| Level { alpha: 1.0, sigma, timestep: self.training.timestep_of(sigma) };
        match self.profile.middle {
            Middle::Landing => to,
            _ if to.sigma == 0.0 => to,
            Middle::Geometric => real((at.sigma * to.sigma).sqrt()),
            Middle::Ancestral => real((at.sigma * ancestral(at.sigma, to.sigma, self.eta).0).sqrt()),
            Middle::Raised => match next {
                Some(next) if self.strides => self.whole(next.timestep + stride).unwrap_or(at),
                _ => at,
            },
            Middle::Noised => self.whole(((1.0 - self.eta) * to.timestep).floor()).unwrap_or(to),
        }
    }
}
