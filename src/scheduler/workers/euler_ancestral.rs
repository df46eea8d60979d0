//! Euler's method with ancestral noise: k-diffusion's `sample_euler_ancestral`; σ_down and σ_up of
//! Karras et al. 2022, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, ancestral, blend};

pub(crate) struct EulerAncestral;

impl Algorithm for EulerAncestral {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "Euler a",
            about: "First order, fresh noise at every step",
            aliases: &["euler_a", "k_euler_a", "sample_euler_ancestral", "EulerAncestralDiscreteScheduler"],
            grid: Grid::Real,
            middle: Middle::Landing,
            end: End::Image,
            calls: Calls::One,
            eta: Some(1.0),
        }
    }
}

impl Worker<SampleTask<'_>> for EulerAncestral {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let (down, up) = ancestral(step.at.sigma, step.to.sigma, plan.eta);
            let kept = down / step.at.sigma;
            // Noise is drawn at the last step too, where it counts for nothing.
            x = blend(&[(kept, &x), (1.0 - kept, &x0), (up, &noise.draw()?)])?;
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
