//! UniPC-2 in x₀ with B(h) = e^h − 1 ("bh2"): Zhao et al. 2023, <https://arxiv.org/abs/2302.04867>, algorithms 5 and 6

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, Level, SamplingPlan, Step};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

const ORDER: usize = 2;

pub(crate) struct Unipc;

impl Sampler for Unipc {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "UniPC",
            about: "Second order predictor and corrector, one model call a step",
            aliases: &["uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"],
            grid: Grid::Padded,
            midpoint: Midpoint::Endpoint,
            end: End::Checkpoint,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        let mut older: Option<ModelOutput> = None;
        let mut newest: Option<(ModelOutput, Tensor, usize)> = None; // with the corrected x and the order of the step from there
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            if let Some((known, x_before, order)) = &newest {
                let way = Step { at: known.at, midpoint: step.at, to: step.at };
                let base = older.as_ref().filter(|_| *order == 2);
                x = corrected(&way, x_before, known, base, &x0)?;
            }
            let known = ModelOutput { x0: x0.clone(), at: step.at };
            let taken = i - plan.run.start;
            let order = ORDER.min(plan.trajectory.len() - i).min(taken + 1);
            older = newest.take().map(|(known, ..)| known);
            let next = predicted(step, &x, &known, older.as_ref().filter(|_| order == 2))?;
            newest = Some((known, std::mem::replace(&mut x, next), order));
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}

/// A model output and its level.
struct ModelOutput {
    x0: Tensor,
    at: Level,
}

/// The predictor: from `x` at `way.at`, by its model output and, if given, the one before.
fn predicted(way: &Step, x: &Tensor, known: &ModelOutput, older: Option<&ModelOutput>) -> Result<Tensor> {
    let (kept, taken) = first_order(way);
    match older {
        Some(older) => {
            let weight = 0.5 * taken / ((older.at.lambda() - known.at.lambda()) / way.span());
            blend(&[(kept, x), (taken - weight, &known.x0), (weight, &older.x0)])
        }
        None => blend(&[(kept, x), (taken, &known.x0)]),
    }
}

/// The corrector: the same step again, with the model output at its end.
fn corrected(way: &Step, x: &Tensor, known: &ModelOutput, older: Option<&ModelOutput>, x0: &Tensor) -> Result<Tensor> {
    let (kept, taken) = first_order(way);
    let Some(older) = older else {
        return blend(&[(kept, x), (0.5 * taken, &known.x0), (0.5 * taken, x0)]);
    };
    // The two weights match the first two φ functions of the exponential integrator at the nodes r and 1.
    let hh = -way.span();
    let b_h = hh.exp_m1();
    let phi_2 = b_h / hh - 1.0;
    let phi_3 = phi_2 / hh - 0.5;
    let (b1, b2) = (phi_2 / b_h, 2.0 * phi_3 / b_h);
    let r = (older.at.lambda() - known.at.lambda()) / way.span();
    let first = (b1 - b2) / (1.0 - r);
    let (old, new) = (taken * first / r, taken * (b1 - first));
    blend(&[(kept, x), (taken - old - new, &known.x0), (old, &older.x0), (new, x0)])
}

/// The factors of x and x₀ in a first-order step.
fn first_order(way: &Step) -> (f64, f64) {
    (way.to.sigma / way.at.sigma, way.to.alpha * (1.0 - way.to.ratio() / way.at.ratio()))
}
