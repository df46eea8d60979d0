//! Every instructor, and the one match over domains.

use serde::Serialize;

use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::interface as conditioning;
use crate::context::Context;
use crate::device::instructor::DeviceInstructor;
use crate::device::interface as device;
use crate::error::{Error, Result};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface as inference;
use crate::layers::Instructor;
use crate::managers::Managers;
use crate::model::instructor::ModelInstructor;
use crate::model::interface as model;
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::postprocessing::interface as postprocessing;
use crate::runtime::config;
use crate::scheduler::instructor::SchedulerInstructor;
use crate::scheduler::interface as scheduler;
use crate::units::Bytes;

/// A typed request of any domain below the lane.
#[derive(Clone, Debug)]
pub enum Call {
    Device(device::Request),
    Scheduler(scheduler::Request),
    Model(model::Request),
    Conditioning(conditioning::Request),
    Postprocessing(postprocessing::Request),
    Inference(inference::Request),
    /// What a generation would need; nothing is made.
    Estimate(Box<inference::GenerateRequest>),
}

impl Call {
    /// Whether it may wait for the network, and goes to the thread that nothing else waits for.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self, Self::Model(request) if request.needs_network())
    }

    /// Whether a repository that it names is downloaded for it. What only asks about a model waits for no download.
    #[must_use]
    pub fn has_fetched(&self) -> bool {
        self.needs_compute() && !matches!(self, Self::Model(model::Request::Unload(_)))
    }

    /// Whether it must wait for the compute thread. What needs none is answered while an image is made.
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

/// What a call gave.
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

/// One instructor a domain. Inference leads the others.
pub struct Instructors {
    pub inference: InferenceInstructor,
}

impl Instructors {
    /// # Errors
    /// A setting that names what this worker does not have.
    pub fn new(settings: &config::Instructors) -> Result<Self> {
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

    /// # Errors
    /// Those of the instructor that is called.
    pub fn dispatch(&self, call: Call, managers: &mut Managers, ctx: &Context) -> Result<Reply> {
        let compute = call.needs_compute();
        // Beside the compute thread the managers are empty, and what it holds is read from what it published.
        let residents = (!compute).then(|| managers.published.residents());
        managers.model().published = residents;
        let lead = &self.inference;
        if compute {
            let placement = lead.device.place(&mut managers.device, None)?;
            let room = lead.device.room(&managers.device);
            managers.model().begin(room, placement.device.is_cpu());
            managers.model().placement = Some(placement);
        }
        let reply = match call {
            Call::Device(request) => lead.device.instruct(request, &mut managers.device, ctx).map(Reply::Device),
            Call::Scheduler(request) => lead.scheduler.instruct(request, &mut (), ctx).map(Reply::Scheduler),
            Call::Model(request) => lead.model.instruct(request, managers.model(), ctx).map(Reply::Model),
            Call::Conditioning(request) => {
                lead.conditioning.instruct(request, &mut managers.conditioning, ctx).map(Reply::Conditioning)
            }
            Call::Postprocessing(request) => {
                lead.postprocessing.instruct(request, &mut (), ctx).map(Reply::Postprocessing)
            }
            Call::Inference(request) => lead.instruct(request, managers, ctx).map(Reply::Inference),
            Call::Estimate(request) => lead.estimate(&request, managers, ctx).map(Reply::Inference),
        };
        if !compute {
            return reply;
        }
        let room = lead.device.room(&managers.device);
        managers.publish(room);
        reply.map_err(|error| match (error, room) {
            // The device's own error does not tell.
            (Error::OutOfMemory { stage, needed, free: Bytes(0), fits }, Some(room)) => {
                Error::OutOfMemory { stage, needed, free: room.free, fits }
            }
            (other, _) => other,
        })
    }
}
