//! Multistep consistency sampling of latent consistency models: Luo et al. 2023, <https://arxiv.org/abs/2310.04378>,
//! algorithm 3

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

/// σ of the data and scale of timesteps in the boundary condition's c_skip and c_out.
const SIGMA_DATA: f64 = 0.5;
const TIMESTEP_SCALING: f64 = 10.0;

pub(crate) struct Lcm;

impl Algorithm for Lcm {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "LCM",
            about: "For latent consistency models: few steps, fresh noise between them",
            aliases: &["sample_lcm", "LCMScheduler"],
            grid: Grid::Distilled,
            middle: Middle::Landing,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }
}

impl Worker<SampleTask<'_>> for Lcm {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let t = step.at.timestep * TIMESTEP_SCALING;
            let norm = t * t + SIGMA_DATA * SIGMA_DATA;
            let denoised = blend(&[(t / norm.sqrt(), &x0), (SIGMA_DATA * SIGMA_DATA / norm, &x)])?;
            x = match i + 1 == plan.path.len() {
                true => denoised,
                false => blend(&[(step.to.alpha, &denoised), (step.to.sigma, &noise.draw()?)])?,
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
