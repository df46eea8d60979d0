//! Runs plans: the loop over passes, the images of a request, and the memory that they take.

pub(crate) mod batch;
pub(crate) mod estimate;
pub(crate) mod memory;
pub mod pipeline;

use crate::conditioning::instructor::ConditioningInstructor;
use crate::context::Context;
use crate::device::instructor::{DeviceInstructor, Placement};
use crate::inference::managers::memory::MemoryPlanner;
use crate::managers::Managers;
use crate::managers::throughput::ThroughputKey;
use crate::model::checkpoint::Checkpoint;
use crate::postprocessing::instructor::PostprocessingInstructor;

/// The compute thread's state while it works on one request.
pub struct Session<'a> {
    pub placement: &'a Placement,
    pub managers: &'a mut Managers,
    pub ctx: &'a Context,
}

/// The instructors that take part in making an image, and the memory planner.
#[derive(Clone, Copy)]
pub struct Domains<'a> {
    pub device: &'a DeviceInstructor,
    pub conditioning: &'a ConditioningInstructor,
    pub postprocessing: &'a PostprocessingInstructor,
    pub(crate) memory: MemoryPlanner<'a>,
}

fn throughput_key(checkpoint: &Checkpoint, placement: &Placement) -> ThroughputKey {
    ThroughputKey { model: checkpoint.key, dtype: placement.compute, quantization: placement.quantization }
}
