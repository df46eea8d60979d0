//! DPM-Solver++(2M): Lu et al. 2022, <https://arxiv.org/abs/2211.01095>, algorithm 2, midpoint

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, Level, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

/// Fewer steps than this end with a first-order step wherever they end.
pub(crate) const FEW_STEPS: usize = 15;

pub(crate) struct Dpmpp2m;

impl Sampler for Dpmpp2m {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2M",
            about: "Second order from the step before, one model call a step",
            aliases: &[
                "k_dpmpp_2m",
                "sample_dpmpp_2m",
                "DPMSolverMultistepScheduler",
                "EDMDPMSolverMultistepScheduler",
            ],
            grid: Grid::Padded,
            midpoint: Midpoint::Endpoint,
            end: End::Checkpoint,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        let mut before: Option<(Tensor, Level)> = None;
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let shrink = step.to.ratio() / step.at.ratio(); // e^(−h)
            let kept = step.to.sigma / step.at.sigma;
            let taken = step.to.alpha * (1.0 - shrink);
            let last = plan.is_last(i) && (step.to.sigma == 0.0 || plan.trajectory.len() < FEW_STEPS);
            x = match &before {
                Some((x0_before, level)) if !last => {
                    let half = 0.5 * step.span() / (step.at.lambda() - level.lambda()); // 1 / 2r
                    blend(&[(kept, &x), (taken * (1.0 + half), &x0), (-taken * half, x0_before)])?
                }
                _ => blend(&[(kept, &x), (taken, &x0)])?,
            };
            x = model.step(x, &x0)?;
            before = Some((x0, step.at));
        }
        Ok(x)
    }
}
