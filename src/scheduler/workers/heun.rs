//! Heun's method: Karras et al. 2022, algorithm 2 without churn, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Heun;

impl Algorithm for Heun {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "Heun",
            about: "Second order, two model calls a step",
            aliases: &["k_heun", "sample_heun", "HeunDiscreteScheduler"],
            grid: Grid::Real,
            middle: Middle::Landing,
            end: End::Image,
            calls: Calls::Two,
            eta: None,
        }
    }
}

impl Worker<SampleTask<'_>> for Heun {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, land, .. } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let mut x0 = denoiser(&x, step.at)?;
            let (from, to) = (step.at.sigma, step.to.sigma);
            let kept = to / from;
            let euler = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
            x = if to > 0.0 {
                ctx.checkpoint()?;
                let end = denoiser(&euler, step.middle)?;
                // The mean of the slopes (x − x₀)/σ at both ends, times the way from one to the other.
                let half = 0.5 * (to - from);
                let (a, b) = (half / from, half / to);
                let next = blend(&[(1.0 + a, &x), (-a, &x0), (b, &euler), (-b, &end)])?;
                x0 = end;
                next
            } else {
                euler
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
