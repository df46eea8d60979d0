//! The midpoint method in ln σ, DPM-Solver-2: Karras et al. 2022, algorithm 2 with the step of
//! Lu et al. 2022, <https://arxiv.org/abs/2206.00927>; k-diffusion's `sample_dpm_2`

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Kdpm2;

impl Sampler for Kdpm2 {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM2",
            about: "Second order, two model calls a step, the second between two sigmas",
            aliases: &["dpm_2", "k_dpm_2", "sample_dpm_2", "KDPM2DiscreteScheduler"],
            grid: Grid::ContinuousRounded,
            midpoint: Midpoint::Geometric,
            end: End::Image,
            calls: Calls::Two,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let mut x0 = model.x0(&x, step.at)?;
            let (from, to, middle) = (step.at.sigma, step.to.sigma, step.midpoint.sigma);
            x = if to > 0.0 {
                let kept = middle / from;
                let halfway = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
                x0 = model.x0(&halfway, step.midpoint)?;
                let slope = (to - from) / middle;
                blend(&[(1.0, &x), (slope, &halfway), (-slope, &x0)])?
            } else {
                x0.clone()
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
