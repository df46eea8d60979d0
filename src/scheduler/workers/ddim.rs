//! DDIM: Song et al. 2020, <https://arxiv.org/abs/2010.02502>, equations 12 and 16

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Ddim;

impl Sampler for Ddim {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DDIM",
            about: "First order, deterministic unless eta is above 0",
            aliases: &["k_ddim", "DDIMScheduler"],
            grid: Grid::Discrete,
            midpoint: Midpoint::Endpoint,
            end: End::FirstAlpha,
            calls: Calls::One,
            eta: Some(0.0),
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (_, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let (at, to) = (step.at, step.to);
            let variance = (to.sigma / at.sigma).powi(2) * (1.0 - (at.alpha / to.alpha).powi(2));
            let fresh = plan.eta * variance.max(0.0).sqrt();
            let direction = (to.sigma * to.sigma - fresh * fresh).max(0.0).sqrt();
            // ε = (x − α·x₀) / σ
            let kept = direction / at.sigma;
            let x0_part = (to.alpha - kept * at.alpha, &x0);
            x = match plan.eta > 0.0 {
                true => blend(&[(kept, &x), x0_part, (fresh, &model.noise()?)])?,
                false => blend(&[(kept, &x), x0_part])?,
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
