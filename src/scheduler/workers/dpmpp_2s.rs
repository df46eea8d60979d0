//! DPM-Solver++(2S), every second step using the one before: Lu et al. 2022, <https://arxiv.org/abs/2211.01095>,
//! algorithm 1, midpoint

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, Level, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Dpmpp2s;

impl Sampler for Dpmpp2s {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "DPM++ 2S",
            about: "Second order over pairs of steps, one model call a step",
            aliases: &["DPMSolverSinglestepScheduler"],
            grid: Grid::Padded,
            midpoint: Midpoint::Endpoint,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        let mut start: Option<PairStart> = None;
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let pairs = i % 2 == 1 && !plan.is_last(i);
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
                    start = Some(PairStart { x, x0: x0.clone(), at: step.at });
                    next
                }
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}

/// The sample at the start of a pair of steps.
struct PairStart {
    x: Tensor,
    x0: Tensor,
    at: Level,
}
