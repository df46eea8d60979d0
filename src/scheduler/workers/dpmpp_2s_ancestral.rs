//! DPM-Solver++(2S) with ancestral noise: Lu et al. 2022, <https://arxiv.org/abs/2211.01095>; k-diffusion's
//! `sample_dpmpp_2s_ancestral`

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, ancestral, blend};

pub(crate) struct Dpmpp2sAncestral;

impl Algorithm for Dpmpp2sAncestral {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2S a",
            about: "Second order, two model calls and fresh noise at every step",
            aliases: &["dpmpp_2s_a", "k_dpmpp_2s_a", "sample_dpmpp_2s_ancestral"],
            grid: Grid::Real,
            middle: Middle::Ancestral,
            end: End::Image,
            calls: Calls::Two,
            eta: Some(1.0),
        }
    }
}

impl Worker<SampleTask<'_>> for Dpmpp2sAncestral {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let mut x0 = denoiser(&x, step.at)?;
            let (from, to) = (step.at.sigma, step.to.sigma);
            x = if to > 0.0 {
                // With t = −ln σ the exponential integrator keeps σ'/σ of x and takes the rest from x₀.
                let kept = step.middle.sigma / from;
                let halfway = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
                ctx.checkpoint()?;
                x0 = denoiser(&halfway, step.middle)?;
                let (down, up) = ancestral(from, to, plan.eta);
                let kept = down / from;
                blend(&[(kept, &x), (1.0 - kept, &x0), (up, &noise.draw()?)])?
            } else {
                x0.clone()
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
