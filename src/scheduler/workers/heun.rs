//! Heun's method: Karras et al. 2022, algorithm 2 without churn, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Heun;

impl Sampler for Heun {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "Heun",
            about: "Second order, two model calls a step",
            aliases: &["k_heun", "sample_heun", "HeunDiscreteScheduler"],
            grid: Grid::Continuous,
            midpoint: Midpoint::Endpoint,
            end: End::Image,
            calls: Calls::Two,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let mut x0 = model.x0(&x, step.at)?;
            let (from, to) = (step.at.sigma, step.to.sigma);
            let kept = to / from;
            let euler = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
            x = if to > 0.0 {
                let end = model.x0(&euler, step.midpoint)?;
                // The mean of the slopes (x − x₀)/σ at both ends, times the way from one to the other.
                let half = 0.5 * (to - from);
                let (a, b) = (half / from, half / to);
                let next = blend(&[(1.0 + a, &x), (-a, &x0), (b, &euler), (-b, &end)])?;
                x0 = end;
                next
            } else {
                euler
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
