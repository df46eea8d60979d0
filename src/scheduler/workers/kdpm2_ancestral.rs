//! The midpoint method in ln σ with ancestral noise: k-diffusion's `sample_dpm_2_ancestral`; see
//! Karras et al. 2022, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, ancestral, blend};

pub(crate) struct Kdpm2Ancestral;

impl Sampler for Kdpm2Ancestral {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM2 a",
            about: "Second order, two model calls and fresh noise at every step",
            aliases: &["kdpm2_a", "k_dpm_2_a", "sample_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"],
            grid: Grid::ContinuousRounded,
            midpoint: Midpoint::Ancestral,
            end: End::Image,
            calls: Calls::Two,
            eta: Some(1.0),
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
                let (down, up) = ancestral(from, to, plan.eta);
                let slope = (down - from) / middle;
                blend(&[(1.0, &x), (slope, &halfway), (-slope, &x0), (up, &model.noise()?)])?
            } else {
                x0.clone()
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
