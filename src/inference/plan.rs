//! A generation with nothing left to decide.

use std::sync::Arc;

use super::guidance::Guidance;
use super::interface::GenerateRequest;
use crate::conditioning::instructor::PromptWish;
use crate::device::interface::{Dtype, Quantization};
use crate::model::checkpoint::Checkpoint;
use crate::noise::{RngKind, Seed};
use crate::postprocessing::instructor::OutputPlan;
use crate::scheduler::schedule::SamplingPlan;
use crate::units::ImageSize;

/// What the whole recipe needs, decided and checked.
pub struct GenerationPlan {
    pub checkpoint: Arc<Checkpoint>,
    /// What the request asks for; the device policy answers.
    pub dtype: Option<Dtype>,
    /// Likewise.
    pub quantization: Option<Quantization>,
    pub prompt: PromptWish,
    pub size: ImageSize,
    /// One image each.
    pub seeds: Vec<Seed>,
    pub rng: RngKind,
    pub guidance: Guidance,
    pub sampling: SamplingPlan,
    pub time_ids: TimeIds,
    pub output: OutputPlan,
    /// Every value used, as a request that makes the same images.
    pub parameters: GenerateRequest,
}

impl GenerationPlan {
    /// How often the network is evaluated for one image: every pass counts.
    #[must_use]
    pub fn passes(&self) -> usize {
        let steps = self.sampling.steps();
        // Steps of two evaluations make both with the passes of the step.
        (self.sampling.evaluations() * self.guidance.passes(steps)).div_ceil(steps.max(1))
    }
}

/// The six numbers of SDXL's size conditioning, in pixels: original height and width, crop top and left, target height
/// and width. The refiner reads the first four and an aesthetic score in place of the last two.
#[derive(Clone, Debug, PartialEq)]
pub struct TimeIds {
    pub positive: Vec<f64>,
    pub negative: Vec<f64>,
}
