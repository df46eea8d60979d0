//! Answers control operations from what stands on the floor.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::communication::dispatcher::{Floor, Station};
use crate::communication::interface::{
    Cancelled, CancelledAll, Capabilities, Communication, Compute, Ending, Health, Hello, Limits, MAX_DEPTH,
    MAX_ID_CHARS, MAX_PRIORITY, MAX_TIMEOUT_MS, Metrics, PROTOCOL, Pong, Request, Response, Running, Status, Waiting,
};
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

/// Changes what is logged.
pub type SetLogLevel = Box<dyn Fn(LogLevel) -> Result<()>>;

pub struct CommunicationInstructor {
    pub inference: InferenceSettings,
    pub set_log_level: SetLogLevel,
}

impl Instructor for CommunicationInstructor {
    type Interface = Communication;
    type Resources<'a> = &'a mut Floor;

    fn instruct(&self, request: Request, floor: &mut Floor, _ctx: &Context) -> Result<Response> {
        Ok(match request {
            Request::Hello(_) => Response::Hello(hello(floor)),
            Request::Capabilities(_) => Response::Capabilities(Box::new(self.capabilities(floor))),
            Request::Schema(_) => Response::Schema(schema::document()?),
            Request::Health(_) => Response::Health(health(floor)),
            Request::Metrics(_) => Response::Metrics(metrics(floor)),
            Request::Status(_) => Response::Status(status(floor)),
            Request::Estimate(_) => return Err(Error::bug("an estimate is a lane's work")),
            Request::Cancel(request) => Response::Cancel(Cancelled { found: floor.cancel(&request.request_id) }),
            Request::CancelAll(_) => {
                let (queued, running) = floor.cancel_all();
                Response::CancelAll(CancelledAll { queued, running })
            }
            Request::Drain(_) => {
                floor.draining = true;
                Response::Drain(ending(floor))
            }
            Request::Shutdown(request) => {
                floor.shut_down(request.mode.unwrap_or(OnEof::Finish));
                Response::Drain(ending(floor))
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
    fn capabilities(&self, floor: &Floor) -> Capabilities {
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
                max_line_bytes: floor.line_limit(),
                queue_limit: floor.settings.queue_limit,
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

/// What this worker performs, by `worker_type`.
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

fn hello(floor: &Floor) -> Hello {
    Hello {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        protocol: PROTOCOL,
        pid: std::process::id(),
        uptime_ms: floor.uptime_ms(),
        cpu_features: simd::level().name(),
    }
}

fn health(floor: &Floor) -> Health {
    let station = &floor.compute;
    let compute = match (&station.running, station.ready) {
        (Some(_), _) => Compute::Busy,
        (None, true) => Compute::Idle,
        (None, false) => Compute::Starting,
    };
    Health {
        accepting: !floor.draining,
        compute,
        uptime_ms: floor.uptime_ms(),
        silent_ms: station.running.as_ref().map(|_| ms(station.heard.elapsed())),
    }
}

fn metrics(floor: &Floor) -> Metrics {
    let counters = &floor.ledger.counters;
    Metrics {
        lines: counters.lines,
        accepted: counters.accepted,
        finished: counters.finished,
        failed: counters.failed.clone(),
        images: counters.images,
        queue_depth: queue_depth(floor),
        running: running(floor).len(),
        dropped_events: floor.ledger.dropped_events(),
        uptime_ms: floor.uptime_ms(),
        seconds_per_step: counters.seconds_per_step,
    }
}

pub fn queue_depth(floor: &Floor) -> usize {
    floor.stations().iter().map(|station| station.queue.len()).sum()
}

fn status(floor: &Floor) -> Status {
    let now = Instant::now();
    let waiting = |station: &Station| -> Vec<Waiting> {
        let told = station.queue.in_order(now).into_iter().filter_map(|waiting| {
            let open = floor.ledger.get(&waiting.job.request_id)?;
            Some(Waiting {
                request_id: waiting.job.request_id.clone(),
                worker_type: open.worker_type.name(),
                operation: open.operation.clone(),
                priority: waiting.priority,
                waited_ms: ms(now.saturating_duration_since(waiting.arrived)),
            })
        });
        told.collect()
    };
    let queue = floor.stations().into_iter().flat_map(waiting).collect();
    Status { draining: floor.draining, queue, running: running(floor), residents: floor.published.residents() }
}

fn running(floor: &Floor) -> Vec<Running> {
    let ids = floor.stations().into_iter().filter_map(|station| station.running.as_ref());
    let told = ids.filter_map(|id| {
        let open = floor.ledger.get(id)?;
        Some(Running {
            request_id: id.clone(),
            worker_type: open.worker_type.name(),
            operation: open.operation.clone(),
            running_ms: ms(open.started.map_or_else(Default::default, |started| started.elapsed())),
            stage: open.stage,
            done: open.done,
            total: open.total,
        })
    });
    told.collect()
}

fn ending(floor: &Floor) -> Ending {
    Ending { draining: floor.draining, in_flight: floor.ledger.in_flight() }
}
