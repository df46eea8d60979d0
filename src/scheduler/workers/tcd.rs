//! Strategic stochastic sampling of trajectory consistency distillation: Zheng et al. 2024,
//! <https://arxiv.org/abs/2402.19159>, algorithm 4; η is the paper's γ

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Tcd;

impl Sampler for Tcd {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "TCD",
            about: "For trajectory consistency models: few steps, fresh noise by eta",
            aliases: &["TCDScheduler"],
            grid: Grid::Distilled,
            midpoint: Midpoint::BeforeRenoising,
            end: End::FirstTimestep,
            calls: Calls::One,
            eta: Some(0.3),
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let (at, s, to) = (step.at, step.midpoint, step.to);
            let kept = s.sigma / at.sigma;
            let below = blend(&[(kept, &x), (s.alpha - kept * at.alpha, &x0)])?;
            x = match plan.eta > 0.0 && !plan.is_last(i) {
                true => {
                    let share = (to.alpha / s.alpha).min(1.0);
                    blend(&[(share, &below), ((1.0 - share * share).sqrt(), &model.noise()?)])?
                }
                false => below,
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}
