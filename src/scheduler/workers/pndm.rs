//! Pseudo linear multistep, order 4, the first step corrected by a second model call:
//! Liu et al. 2022, <https://arxiv.org/abs/2202.09778>, equations 9 and 11

use std::collections::VecDeque;

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::config::Prediction;
use crate::scheduler::plan::{Calls, Level, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

pub(crate) struct Pndm;

impl Sampler for Pndm {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "PLMS",
            about: "Fourth order from earlier steps, one model call a step and one more at first",
            aliases: &["k_plms", "PNDMScheduler"],
            grid: Grid::Discrete,
            midpoint: Midpoint::PndmWarmup,
            end: End::FirstAlpha,
            calls: Calls::TwoAtFirst,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        let v = plan.prediction == Prediction::VPrediction;
        // Network outputs, newest first. Of the two in the first step only the first is kept.
        let mut outputs: VecDeque<Tensor> = VecDeque::with_capacity(4);
        for (i, step) in plan.run_steps() {
            let mut x0 = model.x0(&x, step.at)?;
            outputs.truncate(3);
            outputs.push_front(output(&x, &x0, step.at, v)?);
            let weights: &[f64] = match outputs.len() {
                1 => &[1.0],
                2 => &[1.5, -0.5],
                3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
                _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
            };
            let mixed = blend(&weights.iter().copied().zip(&outputs).collect::<Vec<_>>())?;
            let next = moved(&x, &mixed, step.at, step.to, v)?;
            x = match plan.trajectory.get(i + 1) {
                Some(second) if i == plan.run.start && plan.corrects_first() => {
                    x0 = model.x0(&next, second.at)?;
                    let mean = blend(&[(0.5, &output(&next, &x0, second.at, v)?), (0.5, &mixed)])?;
                    moved(&x, &mean, step.midpoint, second.at, v)?
                }
                _ => next,
            };
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}

/// The network's output, ε or v, recovered from x₀.
fn output(x: &Tensor, x0: &Tensor, at: Level, v: bool) -> Result<Tensor> {
    let per = 1.0 / at.sigma;
    match v {
        true => blend(&[(at.alpha * per, x), (-per, x0)]),
        false => blend(&[(per, x), (-at.alpha * per, x0)]),
    }
}

/// Equation 11: the transfer from one level to another along ε.
fn moved(x: &Tensor, output: &Tensor, at: Level, to: Level, v: bool) -> Result<Tensor> {
    let (a, b) = (at.alpha * at.alpha, to.alpha * to.alpha);
    let along = -(b - a) / (a * to.sigma + at.alpha * at.sigma * to.alpha);
    let kept = to.alpha / at.alpha;
    match v {
        true => blend(&[(kept + along * at.sigma, x), (along * at.alpha, output)]),
        false => blend(&[(kept, x), (along, output)]),
    }
}
