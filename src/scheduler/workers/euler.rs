//! Euler's method: Karras et al. 2022, algorithm 2 without churn, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Euler;

impl Sampler for Euler {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "Euler",
            about: "First order, deterministic",
            aliases: &["k_euler", "sample_euler", "EulerDiscreteScheduler", "EDMEulerScheduler"],
            grid: Grid::Continuous,
            midpoint: Midpoint::Endpoint,
            end: End::Checkpoint,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let kept = step.to.sigma / step.at.sigma;
            x = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
