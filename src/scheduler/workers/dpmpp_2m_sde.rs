//! SDE-DPM-Solver++(2M): Lu et al. 2022, <https://arxiv.org/abs/2211.01095>, equation 19 and algorithm 2, midpoint;
//! η as in k-diffusion's `sample_dpmpp_2m_sde`

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, Level, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};
use crate::scheduler::workers::dpmpp_2m::FEW_STEPS;

pub(crate) struct Dpmpp2mSde;

impl Sampler for Dpmpp2mSde {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2M SDE",
            about: "Second order from the step before, fresh noise at every step",
            aliases: &["k_dpmpp_2m_sde", "sample_dpmpp_2m_sde"],
            grid: Grid::Padded,
            midpoint: Midpoint::Endpoint,
            end: End::Checkpoint,
            calls: Calls::One,
            eta: Some(1.0),
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        let mut before: Option<(Tensor, Level)> = None;
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let draw = model.noise()?;
            let shrink = step.to.ratio() / step.at.ratio(); // e^(−h)
            let churn = shrink.powf(plan.eta); // e^(−ηh)
            let kept = step.to.sigma / step.at.sigma * churn;
            let taken = step.to.alpha * (1.0 - shrink * churn);
            let fresh = step.to.sigma * (1.0 - churn * churn).sqrt();
            let last = plan.is_last(i) && (step.to.sigma == 0.0 || plan.trajectory.len() < FEW_STEPS);
            x = match &before {
                Some((x0_before, level)) if !last => {
                    let half = 0.5 * step.span() / (step.at.lambda() - level.lambda()); // 1 / 2r
                    let terms = [(taken * (1.0 + half), &x0), (-taken * half, x0_before)];
                    blend(&[(kept, &x), terms[0], terms[1], (fresh, &draw)])?
                }
                _ => blend(&[(kept, &x), (taken, &x0), (fresh, &draw)])?,
            };
            x = model.step(x, &x0)?;
            before = Some((x0, step.at));
        }
        Ok(x)
    }
}
