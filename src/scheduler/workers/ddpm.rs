//! DDPM with the smaller fixed variance: Ho et al. 2020, <https://arxiv.org/abs/2006.11239>, equations 6 and 7

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Ddpm;

impl Algorithm for Ddpm {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DDPM",
            about: "First order, fresh noise at every step",
            aliases: &["DDPMScheduler"],
            grid: Grid::Whole,
            middle: Middle::Landing,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }
}

impl Worker<SampleTask<'_>> for Ddpm {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let (at, to) = (step.at, step.to);
            let alpha = at.alpha / to.alpha; // √α of the step
            let beta = 1.0 - alpha * alpha;
            let below = (to.sigma / at.sigma).powi(2);
            let x0_part = (to.alpha * beta / (at.sigma * at.sigma), &x0);
            let x_part = (alpha * below, &x);
            x = match at.timestep > 0.0 {
                true => blend(&[x_part, x0_part, ((below * beta).max(1e-20).sqrt(), &noise.draw()?)])?,
                false => blend(&[x_part, x0_part])?,
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
