//! SDE-DPM-Solver++(2M): Lu et al. 2022, <https://arxiv.org/abs/2211.01095>, equation 19 and algorithm 2, midpoint;
//! η as in k-diffusion's `sample_dpmpp_2m_sde`

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::dpmpp_2m::FEW_STEPS;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Level, Middle, Profile, SampleTask, blend};

pub(crate) struct Dpmpp2mSde;

impl Algorithm for Dpmpp2mSde {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2M SDE",
            about: "Second order from the step before, fresh noise at every step",
            aliases: &["k_dpmpp_2m_sde", "sample_dpmpp_2m_sde"],
            grid: Grid::Padded,
            middle: Middle::Landing,
            end: End::Checkpoint,
            calls: Calls::One,
            eta: Some(1.0),
        }
    }
}

impl Worker<SampleTask<'_>> for Dpmpp2mSde {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        let mut before: Option<(Tensor, Level)> = None;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let draw = noise.draw()?;
            let shrink = step.to.ratio() / step.at.ratio(); // e^(−h)
            let churn = shrink.powf(plan.eta); // e^(−ηh)
            let kept = step.to.sigma / step.at.sigma * churn;
            let taken = step.to.alpha * (1.0 - shrink * churn);
            let fresh = step.to.sigma * (1.0 - churn * churn).sqrt();
            let last = i + 1 == plan.path.len() && (step.to.sigma == 0.0 || plan.path.len() < FEW_STEPS);
            x = match &before {
                Some((x0_before, level)) if !last => {
                    let half = 0.5 * step.span() / (step.at.lambda() - level.lambda()); // 1 / 2r
                    let terms = [(taken * (1.0 + half), &x0), (-taken * half, x0_before)];
                    blend(&[(kept, &x), terms[0], terms[1], (fresh, &draw)])?
                }
                _ => blend(&[(kept, &x), (taken, &x0), (fresh, &draw)])?,
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
            before = Some((x0, step.at));
        }
        Ok(x)
    }
}
