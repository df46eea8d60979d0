//! Euler's method with ancestral noise: k-diffusion's `sample_euler_ancestral`; σ_down and σ_up of
//! Karras et al. 2022, <https://arxiv.org/abs/2206.00364>

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, ancestral, blend};

pub(crate) struct EulerAncestral;

impl Sampler for EulerAncestral {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "Euler a",
            about: "First order, fresh noise at every step",
            aliases: &["euler_a", "k_euler_a", "sample_euler_ancestral", "EulerAncestralDiscreteScheduler"],
            grid: Grid::Continuous,
            midpoint: Midpoint::Endpoint,
            end: End::Image,
            calls: Calls::One,
            eta: Some(1.0),
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let (down, up) = ancestral(step.at.sigma, step.to.sigma, plan.eta);
            let kept = down / step.at.sigma;
            // The last step draws noise too, with factor 0.
            x = blend(&[(kept, &x), (1.0 - kept, &x0), (up, &model.noise()?)])?;
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
