//! Answers the inference domain's operations: plans each request, then makes its images or estimates their cost.

use crate::conditioning::instructor::ConditioningInstructor;
use crate::context::Context;
use crate::device::instructor::DeviceInstructor;
use crate::error::Result;
use crate::inference::interface::{GenerateRequest, GeneratedBatch, Inference, Request, Response, Settings};
use crate::inference::managers::Domains;
use crate::inference::managers::batch::Batch;
use crate::inference::managers::memory::MemoryPlanner;
use crate::inference::plan::GenerationPlan;
use crate::inference::plan::build::Planner;
use crate::inference::plan::operation::Operation;
use crate::layers::Instructor;
use crate::managers::Managers;
use crate::model::instructor::ModelInstructor;
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::scheduler::instructor::SchedulerInstructor;

/// Holds the instructors that it leads.
pub struct InferenceInstructor {
    pub settings: Settings,
    pub device: DeviceInstructor,
    pub scheduler: SchedulerInstructor,
    pub model: ModelInstructor,
    pub conditioning: ConditioningInstructor,
    pub postprocessing: PostprocessingInstructor,
}

impl Instructor for InferenceInstructor {
    type Interface = Inference;
    type Resources<'a> = &'a mut Managers;

    fn instruct(&self, request: Request, resources: &mut Managers, ctx: &Context) -> Result<Response> {
        let images = Batch { domains: self.domains() };
        let (operation, request) = match Operation::of(request) {
            Ok(single) => single,
            Err(batch) => {
                let plans = self.planner(resources).batch(&batch)?.into_iter();
                let results = plans.map(|plan| images.generate(plan, resources, ctx)).collect::<Result<_>>()?;
                return Ok(Response::Batch(GeneratedBatch { results }));
            }
        };
        let plan = self.planner(resources).operation(operation, &request)?;
        images.generate(plan, resources, ctx).map(Response::Generated)
    }
}

impl InferenceInstructor {
    /// Plans a generation.
    ///
    /// # Errors
    /// A value that cannot be used, or a model that cannot be found.
    pub fn plan(&self, request: &GenerateRequest, resources: &mut Managers) -> Result<GenerationPlan> {
        self.planner(resources).plan(request)
    }

    /// Estimates the memory and time that a generation needs; nothing is loaded.
    ///
    /// # Errors
    /// Those of [`Self::plan`], and of reading the headers of its files.
    pub fn estimate(&self, request: &GenerateRequest, resources: &mut Managers, ctx: &Context) -> Result<Response> {
        let mut plan = self.plan(request, resources)?;
        self.domains().memory.estimate(&mut plan, resources, ctx).map(Response::Estimate)
    }

    fn planner<'a>(&'a self, resources: &'a mut Managers) -> Planner<'a> {
        let Self { settings, scheduler, conditioning, postprocessing, .. } = self;
        Planner { settings, scheduler, conditioning, postprocessing, catalog: &mut resources.model().catalog }
    }

    /// The instructors that a pipeline needs.
    #[must_use]
    pub fn domains(&self) -> Domains<'_> {
        let Self { settings, device, conditioning, postprocessing, .. } = self;
        let memory = MemoryPlanner { device, max_side: settings.max_side as usize };
        Domains { device, conditioning, postprocessing, memory }
    }
}
