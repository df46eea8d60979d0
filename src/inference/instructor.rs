//! Answers the operations of the inference domain: plans each request, then makes its images or estimates their cost.

use crate::conditioning::instructor::ConditioningInstructor;
use crate::context::Context;
use crate::device::instructor::DeviceInstructor;
use crate::error::{Error, Result};
use crate::inference::interface::{
    BatchRequest, GenerateRequest, Generated, GeneratedBatch, Inference, Request, Response, Settings,
};
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

/// Holds the instructors it leads.
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
        let (operation, request) = match request {
            Request::Generate(request) => (Operation::Generate, request),
            Request::Text2image(request) => (Operation::Text2image, request),
            Request::Img2img(request) => (Operation::Img2img, request),
            Request::Inpaint(request) => (Operation::Inpaint, request),
            Request::Controlnet(request) => (Operation::Controlnet, request),
            Request::Lora(request) => (Operation::Lora, request),
            Request::Batch(batch) => return self.batch(&batch, resources, ctx).map(Response::Batch),
        };
        operation.check(&request)?;
        let plan = self.plan(&request, resources)?;
        operation.check_plan(&plan)?;
        self.generate(plan, resources, ctx).map(Response::Generated)
    }
}

impl InferenceInstructor {
    /// Plans a generation.
    ///
    /// # Errors
    /// A value that cannot be used, or a model that cannot be found.
    pub fn plan(&self, request: &GenerateRequest, resources: &mut Managers) -> Result<GenerationPlan> {
        let Self { settings, scheduler, conditioning, postprocessing, .. } = self;
        let catalog = &mut resources.model().catalog;
        Planner { settings, scheduler, conditioning, postprocessing, catalog }.plan(request)
    }

    /// Estimates the memory and time that a generation needs; nothing is loaded.
    ///
    /// # Errors
    /// Those of [`Self::plan`], and of reading the headers of its files.
    pub fn estimate(&self, request: &GenerateRequest, resources: &mut Managers, ctx: &Context) -> Result<Response> {
        let mut plan = self.plan(request, resources)?;
        self.domains().memory.estimate(&mut plan, resources, ctx).map(Response::Estimate)
    }

    fn generate(&self, plan: GenerationPlan, resources: &mut Managers, ctx: &Context) -> Result<Generated> {
        Batch { domains: self.domains() }.generate(plan, resources, ctx)
    }

    fn batch(&self, batch: &BatchRequest, resources: &mut Managers, ctx: &Context) -> Result<GeneratedBatch> {
        let (limit, got) = (self.settings.max_batch_size as usize, batch.requests.len());
        if !(1..=limit).contains(&got) {
            return Err(Error::invalid("requests", format!("must hold 1 to {limit} generations, got {got}")));
        }
        let plan =
            |(index, request)| self.plan(request, resources).map_err(|error| error.below(&format!("requests.{index}")));
        let plans = batch.requests.iter().enumerate().map(plan).collect::<Result<Vec<_>>>()?;
        let results = plans.into_iter().map(|plan| self.generate(plan, resources, ctx)).collect::<Result<Vec<_>>>()?;
        Ok(GeneratedBatch { results })
    }

    /// Instructors that a pipeline needs.
    #[must_use]
    pub fn domains(&self) -> Domains<'_> {
        let Self { settings, device, conditioning, postprocessing, .. } = self;
        let memory = MemoryPlanner { device, max_side: settings.max_side as usize };
        Domains { device, conditioning, postprocessing, memory }
    }
}
