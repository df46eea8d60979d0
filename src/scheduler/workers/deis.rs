//! DEIS, log-ρ, order 2: Zhang & Chen 2022, <https://arxiv.org/abs/2204.13902>; ρ is k-diffusion's σ

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};
use crate::scheduler::workers::dpmpp_2m::FEW_STEPS;

pub(crate) struct Deis;

impl Sampler for Deis {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DEIS",
            about: "Second order in the noise, one model call a step; ends at the lowest sigma",
            aliases: &["DEISMultistepScheduler"],
            grid: Grid::Padded,
            midpoint: Midpoint::Endpoint,
            end: End::SigmaMin,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        let mut before: Option<(Tensor, f64)> = None;
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let per = 1.0 / step.at.sigma;
            let eps = blend(&[(per, &x), (-per * step.at.alpha, &x0)])?;
            let (rho, rho_to, alpha) = (step.at.ratio(), step.to.ratio(), step.to.alpha);
            let kept = alpha / step.at.alpha;
            let last = plan.is_last(i) && plan.trajectory.len() < FEW_STEPS;
            x = match &before {
                Some((eps_before, rho_before)) if !last => {
                    let new = weight(rho_to, rho, *rho_before) - weight(rho, rho, *rho_before);
                    let old = weight(rho_to, *rho_before, rho) - weight(rho, *rho_before, rho);
                    blend(&[(kept, &x), (alpha * new, &eps), (alpha * old, eps_before)])?
                }
                _ => blend(&[(kept, &x), (alpha * (rho_to - rho), &eps)])?,
            };
            x = model.step(x, &x0)?;
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
