//! DPM-Solver++(2S) with ancestral noise: Lu et al. 2022, <https://arxiv.org/abs/2211.01095>; k-diffusion's
//! `sample_dpmpp_2s_ancestral`

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, ancestral, blend};

pub(crate) struct Dpmpp2sAncestral;

impl Sampler for Dpmpp2sAncestral {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2S a",
            about: "Second order, two model calls and fresh noise at every step",
            aliases: &["dpmpp_2s_a", "k_dpmpp_2s_a", "sample_dpmpp_2s_ancestral"],
            grid: Grid::Continuous,
            midpoint: Midpoint::Ancestral,
            end: End::Image,
            calls: Calls::Two,
            eta: Some(1.0),
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let mut x0 = model.x0(&x, step.at)?;
            let (from, to) = (step.at.sigma, step.to.sigma);
            x = if to > 0.0 {
                // With t = −ln σ the exponential integrator keeps σ'/σ of x and takes the rest from x₀.
                let kept = step.midpoint.sigma / from;
                let halfway = blend(&[(kept, &x), (1.0 - kept, &x0)])?;
                x0 = model.x0(&halfway, step.midpoint)?;
                let (down, up) = ancestral(from, to, plan.eta);
                let kept = down / from;
                blend(&[(kept, &x), (1.0 - kept, &x0), (up, &model.noise()?)])?
            } else {
                x0.clone()
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
