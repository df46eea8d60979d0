//! DPM-Solver++(2S), every second step using the one before: Lu et al. 2022, <https://arxiv.org/abs/2211.01095>,
//! algorithm 1, midpoint

use candle_core::Tensor;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::scheduler::workers::{Algorithm, Calls, End, Grid, Level, Middle, Profile, SampleTask, blend};

pub(crate) struct Dpmpp2s;

impl Algorithm for Dpmpp2s {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2S",
            about: "Second order over pairs of steps, one model call a step",
            aliases: &["DPMSolverSinglestepScheduler"],
            grid: Grid::Padded,
            middle: Middle::Landing,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }
}

/// Where a pair of steps began.
struct Start {
    x: Tensor,
    x0: Tensor,
    at: Level,
}

impl Worker<SampleTask<'_>> for Dpmpp2s {
    type Output = Tensor;

    fn run(&self, task: SampleTask<'_>, ctx: &Context) -> Result<Tensor> {
        let SampleTask { plan, mut x, denoiser, land, .. } = task;
        let mut start: Option<Start> = None;
        for (i, step) in plan.walk() {
            ctx.checkpoint()?;
            let x0 = denoiser(&x, step.at)?;
            let pairs = i % 2 == 1 && i + 1 != plan.path.len();
            x = match start.take() {
                Some(start) if pairs => {
                    // From the start of the pair to its end, with the slope between its two x₀.
                    let (from, end) = (&start.at, &step.to);
                    let taken = end.alpha * (1.0 - end.ratio() / from.ratio());
                    let h = end.lambda() - from.lambda();
                    let half = 0.5 * h / (step.at.lambda() - from.lambda()); // 1 / 2r
                    let terms = [(taken * (1.0 - half), &start.x0), (taken * half, &x0)];
                    blend(&[(end.sigma / from.sigma, &start.x), terms[0], terms[1]])?
                }
                _ => {
                    let taken = step.to.alpha * (1.0 - step.to.ratio() / step.at.ratio());
                    let next = blend(&[(step.to.sigma / step.at.sigma, &x), (taken, &x0)])?;
                    start = Some(Start { x, x0: x0.clone(), at: step.at });
                    next
                }
            };
            x = land(i + 1 - plan.run.start, x, &x0)?;
        }
        Ok(x)
    }
}
