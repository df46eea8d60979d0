//! The midpoint method in ln σ, DPM-Solver-2: Karras et al. 2022, algorithm 2 with the step of
//! Lu et al. 2022, <https://arxiv.org/abs/2206.00927>; k-diffusion's `sample_dpm_2`

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Kdpm2;

impl Algorithm for Kdpm2 {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM2",
            about: "Second order, two model calls a step, the second between two sigmas",
            aliases: &["dpm_2", "k_dpm_2", "sample_dpm_2", "KDPM2DiscreteScheduler"],
            grid: Grid::RealRounded,
            middle: Middle::Geometric,
            end: End::Image,
            calls: Calls::Two,
            eta: None,
        }
    }
}

impl Worker<SampleTask<'_>> for Kdpm2 {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, land, .. } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let mut x0 = denoiser(&x, step.at)?;
            let (from, to, middle) = (step.at.sigma, step.to.sigma, step.middle.sigma);
            x = if to > 0.0 {
                let kept = middle / from;
                let halfway = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
                ctx.checkpoint()?;
                x0 = denoiser(&halfway, step.middle)?;
                let slope = (to - from) / middle;
                blend(&[(1.0, &x), (slope, &halfway), (-slope, &x0)])?
            } else {
                x0.clone()
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
