//! The midpoint method in ln σ with ancestral noise: k-diffusion's `sample_dpm_2_ancestral`; see
//! Karras et al. 2022, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, ancestral, blend};

pub(crate) struct Kdpm2Ancestral;

impl Algorithm for Kdpm2Ancestral {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM2 a",
            about: "Second order, two model calls and fresh noise at every step",
            aliases: &["kdpm2_a", "k_dpm_2_a", "sample_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"],
            grid: Grid::RealRounded,
            middle: Middle::Ancestral,
            end: End::Image,
            calls: Calls::Two,
            eta: Some(1.0),
        }
    }
}

impl Worker<SampleTask<'_>> for Kdpm2Ancestral {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let mut x0 = denoiser(&x, step.at)?;
            let (from, to, middle) = (step.at.sigma, step.to.sigma, step.middle.sigma);
            x = if to > 0.0 {
                let kept = middle / from;
                let halfway = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
                ctx.checkpoint()?;
                x0 = denoiser(&halfway, step.middle)?;
                let (down, up) = ancestral(from, to, plan.eta);
                let slope = (down - from) / middle;
                blend(&[(1.0, &x), (slope, &halfway), (-slope, &x0), (up, &noise.draw()?)])?
            } else {
                x0.clone()
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
