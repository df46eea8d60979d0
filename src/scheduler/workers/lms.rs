//! Linear multistep (Adams–Bashforth) in σ, order 4: Liu et al. 2022, <https://arxiv.org/abs/2202.09778>, section 3;
//! k-diffusion's `sample_lms`

use std::collections::VecDeque;

use candle_core::Tensor;

use crate::error::Result;
use crate::scheduler::plan::{Calls, SamplingPlan};
use crate::scheduler::sampler::{End, Grid, Midpoint, Model, Profile, Sampler, blend};

const ORDER: usize = 4;

pub(crate) struct Lms;

impl Sampler for Lms {
    fn profile(&self) -> &'static Profile {
        &Profile {
            label: "LMS",
            about: "Fourth order from earlier steps, one model call a step",
            aliases: &["k_lms", "sample_lms", "LMSDiscreteScheduler"],
            grid: Grid::Continuous,
            midpoint: Midpoint::Endpoint,
            end: End::Image,
            calls: Calls::One,
            eta: None,
        }
    }

    fn sample(&self, plan: &SamplingPlan, mut x: Tensor, model: &mut Model<'_>) -> Result<Tensor> {
        // Slopes (x − x₀)/σ, newest first.
        let mut slopes: VecDeque<Tensor> = VecDeque::with_capacity(ORDER);
        for (i, step) in plan.run_steps() {
            let x0 = model.x0(&x, step.at)?;
            let per = 1.0 / step.at.sigma;
            slopes.truncate(ORDER - 1);
            slopes.push_front(blend(&[(per, &x), (-per, &x0)])?);
            // The order counts the steps of the whole path, also when the run began later.
            let order = (i + 1).min(ORDER);
            let nodes: Vec<f64> = plan.trajectory[i + 1 - order..=i].iter().rev().map(|step| step.at.sigma).collect();
            let terms = slopes.iter().enumerate().map(|(k, slope)| (weight(&nodes, k, step.to.sigma), slope));
            x = blend(&std::iter::once((1.0, &x)).chain(terms).collect::<Vec<_>>())?;
            x = model.step(x, &x0)?;
        }
        Ok(x)
    }
}

/// The integral of the Lagrange polynomial that is 1 at node `k` and 0 at the others, from the first node to `end`.
fn weight(nodes: &[f64], k: usize, end: f64) -> f64 {
    let start = nodes[0];
    let polynomial = |x: f64| -> f64 {
        let others = nodes.iter().enumerate().filter(|(j, _)| *j != k);
        others.map(|(_, node)| (x - node) / (nodes[k] - node)).product()
    };
    // Two Gauss points are exact up to the third degree.
    let (centre, half) = (0.5 * (start + end), 0.5 * (end - start));
    let offset = half / 3f64.sqrt();
    half * (polynomial(centre - offset) + polynomial(centre + offset))
}
