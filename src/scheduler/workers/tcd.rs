//! Strategic stochastic sampling of trajectory consistency distillation: Zheng et al. 2024,
//! <https://arxiv.org/abs/2402.19159>, algorithm 4; η is the paper's γ

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Middle, Profile, SampleTask, blend};

pub(crate) struct Tcd;

impl Algorithm for Tcd {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "TCD",
            about: "For trajectory consistency models: few steps, fresh noise by eta",
            aliases: &["TCDScheduler"],
            grid: Grid::Distilled,
            middle: Middle::Noised,
            end: End::FirstTimestep,
            calls: Calls::One,
            eta: Some(0.3),
        }
    }
}

impl Worker<SampleTask<'_>> for Tcd {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, noise, land } = task;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let (at, s, to) = (step.at, step.middle, step.to);
            let kept = s.sigma / at.sigma;
            let below = blend(&[(kept, &x), (s.alpha - kept * at.alpha, &x0)])?;
            x = match plan.eta > 0.0 && i + 1 != plan.path.len() {
                true => {
                    let share = (to.alpha / s.alpha).min(1.0);
                    blend(&[(share, &below), ((1.0 - share * share).sqrt(), &noise.draw()?)])?
                }
                false => below,
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
