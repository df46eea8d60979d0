//! The dispatch of a call: every instructor, the one match over domains, and the one function that calls an instructor.

use serde::Serialize;

use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::interface as conditioning;
use crate::context::Context;
use crate::device::instructor::DeviceInstructor;
use crate::device::interface as device;
use crate::device::scope::RequestScope;
use crate::error::{Error, Result};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface as inference;
use crate::layers::{Instructor, Interface as _, RequestOf, ResponseOf};
use crate::managers::Managers;
use crate::model::instructor::ModelInstructor;
use crate::model::interface as model;
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::postprocessing::interface as postprocessing;
use crate::runtime::config;
use crate::scheduler::instructor::SchedulerInstructor;
use crate::scheduler::interface as scheduler;

/// A typed request of any domain that a lane carries out.
#[derive(Clone, Debug)]
pub enum Call {
    Device(device::Request),
    Scheduler(scheduler::Request),
    Model(model::Request),
    Conditioning(conditioning::Request),
    Postprocessing(postprocessing::Request),
    Inference(inference::Request),
    /// The memory and time that a generation would need; nothing is generated.
    Estimate(Box<inference::GenerateRequest>),
}

impl Call {
    /// True if the call may wait for the network, which only the hub lane does.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self, Self::Model(request) if request.needs_network())
    }

    /// True if a missing repository is downloaded for the call. Queries about a model never wait for a download.
    #[must_use]
    pub fn downloads_missing(&self) -> bool {
        self.needs_compute() && !matches!(self, Self::Model(model::Request::Unload(_)))
    }

    /// True if the call needs the compute thread. Other calls are answered while an image is made.
    #[must_use]
    pub fn needs_compute(&self) -> bool {
        match self {
            Self::Inference(_) => true,
            Self::Model(request) => request.needs_compute(),
            Self::Conditioning(request) => request.needs_compute(),
            Self::Device(_) | Self::Scheduler(_) | Self::Postprocessing(_) | Self::Estimate(_) => false,
        }
    }
}

/// The response to a call.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Reply {
    Device(device::Response),
    Scheduler(scheduler::Response),
    Model(model::Response),
    Conditioning(conditioning::Response),
    Postprocessing(postprocessing::Response),
    Inference(inference::Response),
}

/// The instructors. The one of inference owns those of the other domains.
pub struct Instructors {
    pub inference: InferenceInstructor,
}

impl Instructors {
    /// # Errors
    /// `unknown_name` if a setting names something that this worker does not have.
    pub fn new(settings: &config::InstructorSettings) -> Result<Self> {
        let postprocessing = PostprocessingInstructor::new(settings.postprocessing.clone());
        let roots = postprocessing.roots().clone();
        Ok(Self {
            inference: InferenceInstructor {
                settings: settings.inference.clone(),
                device: DeviceInstructor::new(settings.device.clone()),
                scheduler: SchedulerInstructor::new(settings.scheduler.clone())?,
                model: ModelInstructor,
                conditioning: ConditioningInstructor {
                    settings: settings.conditioning.clone(),
                    roots,
                    delivery: postprocessing.clone(),
                },
                postprocessing,
            },
        })
    }

    /// Has the instructor of a call's domain carry it out.
    ///
    /// # Errors
    /// Those of the instructor.
    pub fn dispatch(&self, call: Call, managers: &mut Managers, ctx: &Context) -> Result<Reply> {
        let compute = call.needs_compute();
        let lead = &self.inference;
        let reply = match call {
            Call::Device(request) => run(&lead.device, request, &mut managers.device, ctx).map(Reply::Device),
            Call::Scheduler(request) => run(&lead.scheduler, request, (), ctx).map(Reply::Scheduler),
            Call::Model(request) => {
                let scope = self.scope(compute, managers)?;
                run(&lead.model, request, scope.with(managers.model()), ctx).map(Reply::Model)
            }
            Call::Conditioning(request) => {
                let scope = self.scope(compute, managers)?;
                run(&lead.conditioning, request, scope.with(&mut managers.conditioning), ctx).map(Reply::Conditioning)
            }
            Call::Postprocessing(request) => run(&lead.postprocessing, request, (), ctx).map(Reply::Postprocessing),
            // Each of its plans has a dtype of its own, and is placed when its memory is planned.
            Call::Inference(request) => run(lead, request, managers, ctx).map(Reply::Inference),
            Call::Estimate(request) => lead.estimate(&request, managers, ctx).map(Reply::Inference),
        };
        if !compute {
            return reply;
        }
        let memory = lead.device.memory_status(&managers.device);
        managers.publish(memory);
        reply.map_err(|error| match error {
            // The device's own error has no numbers.
            Error::OutOfMemory { stage, needed, free: None, fits } => {
                Error::OutOfMemory { stage, needed, free: memory.map(|memory| memory.free), fits }
            }
            other => other,
        })
    }

    /// Establishes where a request runs; on the compute thread its budget begins here.
    fn scope(&self, compute: bool, managers: &mut Managers) -> Result<RequestScope> {
        if !compute {
            return Ok(RequestScope::Query { residents: managers.published.residents() });
        }
        let placement = self.inference.device.place(&mut managers.device, None)?;
        let memory = self.inference.device.memory_status(&managers.device);
        managers.model().begin(memory);
        Ok(RequestScope::Compute { placement })
    }
}

/// Has an instructor carry out one request, in a tracing span of its domain.
///
/// # Errors
/// `cancelled` and `deadline_exceeded` before it begins, then those of the instructor.
pub fn run<I: Instructor>(
    instructor: &I,
    request: RequestOf<I>,
    resources: I::Resources<'_>,
    ctx: &Context,
) -> Result<ResponseOf<I>> {
    ctx.checkpoint()?;
    let span = tracing::debug_span!("instruct", domain = I::Interface::DOMAIN.name());
    span.in_scope(|| instructor.instruct(request, resources, ctx))
}
