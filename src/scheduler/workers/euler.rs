//! Euler's method: Karras et al. 2022, algorithm 2 without churn, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Euler;

impl Algorithm for Euler {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "Euler",
            about: "First order, deterministic",
            aliases: &["k_euler", "sample_euler", "EulerDiscreteScheduler", "EDMEulerScheduler"],
            grid: Grid::Real,
            middle: Middle::Landing,
            end: End::Checkpoint,
            calls: Calls::One,
            eta: None,
        }
    }
}

impl Worker<SampleTask<'_>> for Euler {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, land, .. } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let kept = step.to.sigma / step.at.sigma;
            x = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
