//! DEIS, log-ρ, order 2: Zhang & Chen 2022, <https://arxiv.org/abs/2204.13902>; ρ is k-diffusion's σ

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::dpmpp_2m::FEW_STEPS;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Deis;

impl Algorithm for Deis {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DEIS",
            about: "Second order in the noise, one model call a step; ends at the lowest sigma",
            aliases: &["DEISMultistepScheduler"],
            grid: Grid::Padded,
            middle: Middle::Landing,
            end: End::SigmaMin,
            calls: Calls::One,
            eta: None,
        }
    }
}

impl Worker<SampleTask<'_>> for Deis {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, land, .. } = task;
        let mut before: Option<(Tensor, f64)> = None;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let per = 1.0 / step.at.sigma;
            let eps = blend(&[(per, &x), (-per * step.at.alpha, &x0)])?;
            let (rho, rho_to, alpha) = (step.at.ratio(), step.to.ratio(), step.to.alpha);
            let kept = alpha / step.at.alpha;
            let last = i + 1 == plan.path.len() && plan.path.len() < FEW_STEPS;
            x = match &before {
                Some((eps_before, rho_before)) if !last => {
                    let new = weight(rho_to, rho, *rho_before) - weight(rho, rho, *rho_before);
                    let old = weight(rho_to, *rho_before, rho) - weight(rho, *rho_before, rho);
                    blend(&[(kept, &x), (alpha * new, &eps), (alpha * old, eps_before)])?
                }
                _ => blend(&[(kept, &x), (alpha * (rho_to - rho), &eps)])?,
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
            before = Some((eps, rho));
        }
        Ok(x)
    }
}

/// The integral up to `rho` of the polynomial in ln ρ that is 1 at `one` and 0 at `zero`.
fn weight(rho: f64, one: f64, zero: f64) -> f64 {
    if rho == 0.0 {
        return 0.0;
    }
    rho * (rho.ln() - zero.ln() - 1.0) / (one.ln() - zero.ln())
}
