//! Every instructor, and the one match over domains.

use serde::Serialize;

use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::interface as conditioning;
use crate::context::Context;
use crate::device::instructor::DeviceInstructor;
use crate::device::interface as device;
use crate::error::Result;
use crate::inference::interface as inference;
use crate::layers::Instructor;
use crate::managers::Managers;
use crate::model::instructor::ModelInstructor;
use crate::model::interface as model;
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::postprocessing::interface as postprocessing;
use crate::scheduler::instructor::SchedulerInstructor;
use crate::scheduler::interface as scheduler;

/// A typed request of any domain below the lane.
#[derive(Clone, Debug)]
pub enum Call {
    Device(device::Request),
    Scheduler(scheduler::Request),
    Model(model::Request),
    Conditioning(conditioning::Request),
    Postprocessing(postprocessing::Request),
    Inference(inference::Request),
    /// What a generation would cost; not made.
    Estimate(Box<inference::GenerateRequest>),
}

impl Call {
    /// Whether it must wait for the compute thread. What needs none is answered while an image is made.
    #[must_use]
    pub fn needs_compute(&self) -> bool {
        match self {
            Self::Inference(_) => true,
            Self::Device(_)
            | Self::Scheduler(_)
            | Self::Postprocessing(_)
            | Self::Model(_)
            | Self::Conditioning(_)
            | Self::Estimate(_) => false,
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

pub struct Instructors {
    pub device: DeviceInstructor,
    pub scheduler: SchedulerInstructor,
    pub model: ModelInstructor,
    pub conditioning: ConditioningInstructor,
    pub postprocessing: PostprocessingInstructor,
}

impl Instructors {
    /// # Errors
    /// A setting that names what this worker does not have.
    pub fn new(settings: &crate::config::Instructors) -> Result<Self> {
        Ok(Self {
            device: DeviceInstructor::new(settings.device.clone()),
            scheduler: SchedulerInstructor::new(settings.scheduler.clone())?,
            model: ModelInstructor { settings: settings.model.clone() },
            conditioning: ConditioningInstructor { settings: settings.conditioning.clone() },
            postprocessing: PostprocessingInstructor::new(settings.postprocessing.clone()),
        })
    }

    /// # Errors
    /// Those of the instructor that is called.
    pub fn dispatch(&self, call: Call, managers: &mut Managers, ctx: &Context) -> Result<Reply> {
        Ok(match call {
            Call::Device(request) => Reply::Device(self.device.instruct(request, &mut managers.device, ctx)?),
            Call::Scheduler(request) => Reply::Scheduler(self.scheduler.instruct(request, &mut (), ctx)?),
            Call::Model(request) => Reply::Model(self.model.instruct(request, &mut (), ctx)?),
            Call::Conditioning(request) => Reply::Conditioning(self.conditioning.instruct(request, &mut (), ctx)?),
            Call::Postprocessing(request) => {
                Reply::Postprocessing(self.postprocessing.instruct(request, &mut (), ctx)?)
            }
            Call::Estimate(_) => {
                return Err(crate::error::Error::UnsupportedFeature {
                    what: "`communication.estimate`".to_owned(),
                    hint: None,
                    field: None,
                });
            }
            Call::Inference(_) => return Err(crate::error::Error::bug("no inference yet")),
        })
    }
}
