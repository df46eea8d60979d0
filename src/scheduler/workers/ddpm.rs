//! DDPM with the smaller fixed variance: Ho et al. 2020, <https://arxiv.org/abs/2006.11239>, equations 6 and 7

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Ddpm;

impl Sampler for Ddpm {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DDPM",
            about: "First order, fresh noise at every step",
            aliases: &["DDPMScheduler"],
            grid: Grid::Discrete,
            midpoint: Midpoint::Endpoint,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let (at, to) = (step.at, step.to);
            let alpha = at.alpha / to.alpha; // √α of the step
            let beta = 1.0 - alpha * alpha;
            let below = (to.sigma / at.sigma).powi(2);
            let x0_part = (to.alpha * beta / (at.sigma * at.sigma), &x0);
            let x_part = (alpha * below, &x);
            x = match at.timestep > 0.0 {
                true => blend(&[x_part, x0_part, ((below * beta).max(1e-20).sqrt(), &model.noise()?)])?,
                false => blend(&[x_part, x0_part])?,
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
