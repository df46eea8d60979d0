//! Multistep consistency sampling of latent consistency models: Luo et al. 2023, <https://arxiv.org/abs/2310.04378>,
//! algorithm 3

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

/// σ of the data and scale of timesteps in the boundary condition's c_skip and c_out.
const SIGMA_DATA: f64 = 0.5;
const TIMESTEP_SCALING: f64 = 10.0;

pub(crate) struct Lcm;

impl Sampler for Lcm {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "LCM",
            about: "For latent consistency models: few steps, fresh noise between them",
            aliases: &["sample_lcm", "LCMScheduler"],
            grid: Grid::Distilled,
            midpoint: Midpoint::Endpoint,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let t = step.at.timestep * TIMESTEP_SCALING;
            let norm = t * t + SIGMA_DATA * SIGMA_DATA;
            let denoised = blend(&[(t / norm.sqrt(), &x0), (SIGMA_DATA * SIGMA_DATA / norm, &x)])?;
            x = match plan.is_last(i) {
                true => denoised,
                false => blend(&[(step.to.alpha, &denoised), (step.to.sigma, &model.noise()?)])?,
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
