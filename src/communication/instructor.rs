//! Answers control operations from the dispatcher's state.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::communication::dispatcher::Dispatcher;
use crate::communication::interface::{
    Cancelled, CancelledAll, Capabilities, Communication, ComputeState, Draining, Health, Hello, Limits, MAX_DEPTH,
    MAX_ID_CHARS, MAX_PRIORITY, MAX_TIMEOUT_MS, Metrics, PROTOCOL, Pong, QueuedRequest, Request, Response,
    RunningRequest, Status,
};
use crate::communication::lanes::LaneState;
use crate::communication::ledger::ms;
use crate::communication::responses::Event;
use crate::communication::schema;
use crate::conditioning::interface::Conditioning;
use crate::context::Context;
use crate::device::interface::{Device, Dtype, Quantization};
use crate::error::{Error, Result};
use crate::inference::interface::{Inference, Settings as InferenceSettings};
use crate::kernels::simd;
use crate::layers::{Instructor, Interface};
use crate::model::interface::Model;
use crate::postprocessing::FORMATS;
use crate::postprocessing::interface::Postprocessing;
use crate::runtime::config::{LogLevel, OnEof};
use crate::scheduler::interface::Scheduler;
use crate::scheduler::workers::SAMPLERS;
use crate::scheduler::workers::SPACINGS;
use crate::units::Steps;

/// Changes the log level.
pub type SetLogLevel = Box<dyn Fn(LogLevel) -> Result<()>>;

pub struct CommunicationInstructor {
    pub inference: InferenceSettings,
    pub set_log_level: SetLogLevel,
}

impl Instructor for CommunicationInstructor {
    type Interface = Communication;
    type Resources<'a> = &'a mut Dispatcher;

    fn instruct(&self, request: Request, dispatcher: &mut Dispatcher, _ctx: &Context) -> Result<Response> {
        Ok(match request {
            Request::Hello(_) => Response::Hello(hello(dispatcher)),
            Request::Capabilities(_) => Response::Capabilities(Box::new(self.capabilities(dispatcher))),
            Request::Schema(_) => Response::Schema(schema::document()?),
            Request::Health(_) => Response::Health(health(dispatcher)),
            Request::Metrics(_) => Response::Metrics(metrics(dispatcher)),
            Request::Status(_) => Response::Status(status(dispatcher)),
            Request::Estimate(_) => return Err(Error::bug("an estimate runs on a lane")),
            Request::Cancel(request) => Response::Cancel(Cancelled { found: dispatcher.cancel(&request.request_id) }),
            Request::CancelAll(_) => {
                let (queued, running) = dispatcher.cancel_all();
                Response::CancelAll(CancelledAll { queued, running })
            }
            Request::Drain(_) => {
                dispatcher.draining = true;
                Response::Drain(draining(dispatcher))
            }
            Request::Shutdown(request) => {
                dispatcher.shut_down(request.mode.unwrap_or(OnEof::Finish));
                Response::Drain(draining(dispatcher))
            }
            Request::Ping(_) => Response::Ping(Pong { pong: true }),
            Request::SetLogLevel(request) => {
                (self.set_log_level)(request.level)?;
                Response::SetLogLevel(request)
            }
        })
    }
}

impl CommunicationInstructor {
    fn capabilities(&self, dispatcher: &Dispatcher) -> Capabilities {
        Capabilities {
            version: env!("CARGO_PKG_VERSION"),
            protocol: PROTOCOL,
            operations: operations(),
            samplers: SAMPLERS.names().collect(),
            schedules: SPACINGS.names().collect(),
            formats: FORMATS.names().collect(),
            devices: devices(),
            dtypes: [Dtype::F32, Dtype::Bf16, Dtype::F16].map(Dtype::name).to_vec(),
            quantizations: Quantization::ALL.map(Quantization::name).to_vec(),
            events: Event::NAMES.to_vec(),
            error_codes: Error::CODES.to_vec(),
            limits: Limits {
                max_line_bytes: dispatcher.line_limit(),
                queue_limit: dispatcher.settings.queue_limit,
                max_depth: MAX_DEPTH,
                max_id_chars: MAX_ID_CHARS,
                max_priority: MAX_PRIORITY,
                max_timeout_ms: MAX_TIMEOUT_MS,
                max_steps: u32::from(Steps::MAX),
                max_side: self.inference.max_side,
                max_batch_size: self.inference.max_batch_size,
            },
        }
    }
}

/// The operations that this worker performs, by `worker_type`.
fn operations() -> BTreeMap<&'static str, Vec<&'static str>> {
    fn of<I: Interface>() -> (&'static str, Vec<&'static str>) {
        (I::DOMAIN.name(), I::OPERATIONS.to_vec())
    }
    BTreeMap::from([
        of::<Communication>(),
        of::<Device>(),
        of::<Scheduler>(),
        of::<Model>(),
        of::<Conditioning>(),
        of::<Postprocessing>(),
        of::<Inference>(),
    ])
}

fn devices() -> Vec<&'static str> {
    let all = [("cpu", true), ("cuda", cfg!(feature = "cuda")), ("metal", cfg!(feature = "metal"))];
    all.into_iter().filter(|(_, built)| *built).map(|(name, _)| name).collect()
}

fn hello(dispatcher: &Dispatcher) -> Hello {
    Hello {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        protocol: PROTOCOL,
        pid: std::process::id(),
        uptime_ms: dispatcher.uptime_ms(),
        cpu_features: simd::level().name(),
    }
}

fn health(dispatcher: &Dispatcher) -> Health {
    let lane = &dispatcher.lanes.compute;
    let compute = match (&lane.running, lane.ready) {
        (Some(_), _) => ComputeState::Busy,
        (None, true) => ComputeState::Idle,
        (None, false) => ComputeState::Starting,
    };
    Health {
        accepting: !dispatcher.draining,
        compute,
        uptime_ms: dispatcher.uptime_ms(),
        silent_ms: lane.running.as_ref().map(|_| ms(lane.last_event.elapsed())),
    }
}

fn metrics(dispatcher: &Dispatcher) -> Metrics {
    let counters = &dispatcher.ledger.counters;
    Metrics {
        lines: counters.lines,
        accepted: counters.accepted,
        finished: counters.finished,
        failed: counters.failed.clone(),
        images: counters.images,
        queue_depth: dispatcher.lanes.queue_depth(),
        running: running(dispatcher).len(),
        dropped_events: dispatcher.ledger.dropped_events(),
        uptime_ms: dispatcher.uptime_ms(),
        seconds_per_step: counters.seconds_per_step,
    }
}

fn status(dispatcher: &Dispatcher) -> Status {
    let now = Instant::now();
    let queued = |lane: &LaneState| -> Vec<QueuedRequest> {
        let requests = lane.queue.in_order(now).into_iter().filter_map(|waiting| {
            let open = dispatcher.ledger.get(&waiting.job.request_id)?;
            Some(QueuedRequest {
                request_id: waiting.job.request_id.clone(),
                worker_type: open.worker_type.name(),
                operation: open.operation.clone(),
                priority: waiting.priority,
                waited_ms: ms(now.saturating_duration_since(waiting.arrived)),
            })
        });
        requests.collect()
    };
    let queue = dispatcher.lanes.all().into_iter().flat_map(queued).collect();
    Status {
        draining: dispatcher.draining,
        queue,
        running: running(dispatcher),
        residents: dispatcher.published.residents(),
    }
}

fn running(dispatcher: &Dispatcher) -> Vec<RunningRequest> {
    let ids = dispatcher.lanes.all().into_iter().filter_map(|lane| lane.running.as_ref());
    let requests = ids.filter_map(|id| {
        let open = dispatcher.ledger.get(id)?;
        Some(RunningRequest {
            request_id: id.clone(),
            worker_type: open.worker_type.name(),
            operation: open.operation.clone(),
            running_ms: ms(open.started.map_or_else(Default::default, |started| started.elapsed())),
            stage: open.stage,
            done: open.done,
            total: open.total,
        })
    });
    requests.collect()
}

fn draining(dispatcher: &Dispatcher) -> Draining {
    Draining { draining: dispatcher.draining, in_flight: dispatcher.ledger.in_flight() }
}
