//! DDIM: Song et al. 2020, <https://arxiv.org/abs/2010.02502>, equations 12 and 16

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Ddim;

impl Algorithm for Ddim {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DDIM",
            about: "First order, deterministic unless eta is above 0",
            aliases: &["k_ddim", "DDIMScheduler"],
            grid: Grid::Whole,
            middle: Middle::Landing,
            end: End::FirstAlpha,
            calls: Calls::One,
            eta: Some(0.0),
        }
    }
}

impl Worker<SampleTask<'_>> for Ddim {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let (at, to) = (step.at, step.to);
            let variance = (to.sigma / at.sigma).powi(2) * (1.0 - (at.alpha / to.alpha).powi(2));
            let fresh = plan.eta * variance.max(0.0).sqrt();
            let direction = (to.sigma * to.sigma - fresh * fresh).max(0.0).sqrt();
            // ε = (x − α·x₀) / σ
            let kept = direction / at.sigma;
            let x0_part = (to.alpha - kept * at.alpha, &x0);
            x = match plan.eta > 0.0 {
                true => blend(&[(kept, &x), x0_part, (fresh, &noise.draw()?)])?,
                false => blend(&[(kept, &x), x0_part])?,
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
