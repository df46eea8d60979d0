//! The dispatcher between the wire and the lanes: admission, queues, deadlines, cancellation, and the lanes' events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;

use crate::communication::interface::{CancelOutcome, Head};
use crate::communication::lanes::{LaneId, LaneState, Lanes};
use crate::communication::ledger::{KeyClaim, Ledger, OpenRequest, Terminal, ms};
use crate::communication::pending_downloads::PendingDownloads;
use crate::communication::responses::{EngineReport, Event, Timings, Warning};
use crate::communication::workers::bar::Bar;
use crate::communication::workers::codec::fault::Fault;
use crate::communication::workers::codec::{self, Decoded, RoutedRequest};
use crate::context::{CancelToken, PreviewOptions, Progress, Stage};
use crate::error::Error;
use crate::managers::Published;
use crate::runtime::config::{MainInterface, OnEof};
use crate::runtime::dispatch::Call;
use crate::runtime::lane::{Done, Job, Lane, LaneEvent};
use crate::units::Bytes;

/// The state that control operations may see and change.
pub struct Dispatcher {
    pub settings: MainInterface,
    /// Start of the process.
    pub begun: Instant,
    pub ledger: Ledger,
    pub lanes: Lanes,
    /// New work is refused.
    pub draining: bool,
    /// The process ends as soon as nothing is in flight.
    pub ending: bool,
    /// Reason why a lane can no longer work: it could not be built, or its device is lost.
    pub broken: Option<Error>,
    pub bar: Bar,
    pub published: Arc<Published>,
    downloads: PendingDownloads,
    last_step: Option<Instant>,
}

/// The parts of a [`Dispatcher`] that its creator chooses.
pub struct DispatcherParts {
    pub settings: MainInterface,
    pub begun: Instant,
    pub ledger: Ledger,
    pub compute: Lane,
    pub query: Lane,
    pub hub: Lane,
    pub published: Arc<Published>,
}

/// A call on its way into a queue.
struct Admission<'a> {
    head: &'a Head,
    call: Call,
    warnings: Vec<Warning>,
    fingerprint: u64,
    now: Instant,
}

/// The effect of an idempotency key on a request.
enum Share {
    /// The request runs.
    Runs,
    /// It shares the answer of the request in flight that has its key.
    Follows,
    /// It was answered from memory.
    Answered,
}

impl Dispatcher {
    #[must_use]
    pub fn new(parts: DispatcherParts) -> Self {
        let DispatcherParts { settings, begun, ledger, compute, query, hub, published } = parts;
        let lane = |lane| LaneState::new(lane, settings.queue_limit);
        Self {
            lanes: Lanes { compute: lane(compute), query: lane(query), hub: lane(hub) },
            settings,
            begun,
            ledger,
            draining: false,
            ending: false,
            broken: None,
            bar: Bar::on_stderr(),
            published,
            downloads: PendingDownloads::default(),
            last_step: None,
        }
    }

    /// Decodes a line and queues its call. A control request is returned, to be answered at once.
    pub fn receive(&mut self, line: &[u8]) -> Option<Decoded> {
        self.ledger.counters.lines += 1;
        let auto = self.ledger.auto_id();
        let decoded = match codec::decode(line, &auto) {
            Ok(decoded) => decoded,
            Err(refused) => {
                let duplicate = self.duplicate(&refused.request_id);
                self.ledger.refuse(&refused.request_id, duplicate.as_ref().unwrap_or(&refused.fault), false);
                return None;
            }
        };
        if let Some(fault) = self.duplicate(&decoded.head.request_id) {
            self.ledger.refuse(&decoded.head.request_id, &fault, false);
            return None;
        }
        let Decoded { head, request, warnings, fingerprint } = decoded;
        match request {
            RoutedRequest::Control(_) => Some(Decoded { head, request, warnings, fingerprint }),
            RoutedRequest::Call(call) => {
                let now = Instant::now();
                if let Err(error) = self.admit(Admission { head: &head, call: *call, warnings, fingerprint, now }) {
                    let pointer = matches!(error, Error::InvalidRequest { .. }).then(|| error.pointer()).flatten();
                    self.ledger.refuse(&head.request_id, &Fault::new(error, pointer), head.shorthand);
                }
                None
            }
        }
    }

    /// Refuses a line beyond the limit.
    pub fn receive_too_long(&mut self) {
        self.ledger.counters.lines += 1;
        let id = self.ledger.auto_id();
        let error = Error::LineTooLong { limit: self.line_limit() };
        self.ledger.refuse(&id, &error.into(), false);
    }

    fn duplicate(&self, request_id: &str) -> Option<Fault> {
        self.ledger.get(request_id).map(|_| {
            let error = Error::DuplicateRequestId { request_id: request_id.to_owned() };
            Fault::new(error, Some("/request_id".to_owned()))
        })
    }

    fn admit(&mut self, admission: Admission<'_>) -> Result<(), Error> {
        if let Some(error) = &self.broken {
            return Err(error.for_another_request());
        }
        if self.draining {
            return Err(Error::Draining);
        }
        let share = self.share(&admission)?;
        if let Share::Answered = share {
            return Ok(());
        }
        let Admission { head, call, warnings, now, .. } = admission;
        let id = head.request_id.as_str();
        let lane = lane_of(&call);
        let open = open_request(head, warnings, now);
        let position = match share {
            Share::Runs => self.enqueue(lane, head, job(head, call, &open), now)?,
            Share::Follows | Share::Answered => 0,
        };
        let warnings = open.warnings.clone();
        self.ledger.accept(id, open);
        self.ledger.event(id, &Event::Accepted { position });
        for Warning { message, pointer } in warnings {
            self.ledger.event(id, &Event::Warning { message, pointer });
        }
        if self.lanes.get_mut(lane).running.as_deref() == Some(id) {
            self.mark_started(id);
        }
        Ok(())
    }

    /// Looks up a request's idempotency key.
    fn share(&mut self, admission: &Admission<'_>) -> Result<Share, Error> {
        let Some(key) = &admission.head.idempotency_key else { return Ok(Share::Runs) };
        let (id, limit) = (&admission.head.request_id, self.settings.queue_limit);
        match self.ledger.claim_key(key, admission.fingerprint, id, limit) {
            KeyClaim::First => Ok(Share::Runs),
            KeyClaim::Attached => Ok(Share::Follows),
            KeyClaim::Answered(terminal) => {
                self.ledger.answer(id, &terminal);
                Ok(Share::Answered)
            }
            KeyClaim::Full => Err(Error::QueueFull { limit }),
            KeyClaim::Mismatch => Err(Error::InvalidRequest {
                message: format!("`idempotency_key` `{key}` belongs to a request with other data"),
                pointer: Some("/idempotency_key".to_owned()),
                hint: Some("use a new key for a new request".to_owned()),
            }),
        }
    }

    /// Gives a job to its lane or its queue, and returns how many requests go before it.
    fn enqueue(&mut self, lane: LaneId, head: &Head, job: Job, now: Instant) -> Result<usize, Error> {
        let lane = self.lanes.get_mut(lane);
        // A free lane takes the job at once, so a limit of 0 still lets one request run.
        let position = if lane.is_free() {
            lane.running = Some(job.request_id.clone());
            lane.last_event = now;
            lane.lane.submit(job).map(|()| 0).map_err(|_| Error::bug("the lane has ended"))
        } else {
            lane.queue.push(job, head.priority, now).map(|ahead| ahead + 1)
        };
        if let (Err(_), Some(key)) = (&position, &head.idempotency_key) {
            self.ledger.release_key(key);
        }
        position
    }

    fn mark_started(&mut self, id: &str) {
        if let Some(open) = self.ledger.get_mut(id) {
            open.started = Some(Instant::now());
        }
        if self.lanes.compute.running.as_deref() == Some(id) {
            self.last_step = None;
        }
        if !self.downloads.contains(id) {
            self.ledger.event(id, &Event::Started);
        }
    }

    /// Gives an idle lane its next job.
    fn start_next(&mut self, id: LaneId) {
        let lane = self.lanes.get_mut(id);
        if lane.running.is_some() {
            return;
        }
        let Some(job) = lane.queue.take(Instant::now()) else { return };
        let request_id = job.request_id.clone();
        if lane.lane.submit(job).is_err() {
            self.ledger.fail(&request_id, &Error::bug("the lane has ended"));
            return self.start_next(id);
        }
        lane.running = Some(request_id.clone());
        lane.last_event = Instant::now();
        self.mark_started(&request_id);
    }

    /// Queues a job whose request was accepted before. Until it starts it can be cancelled and can expire like any other.
    fn requeue(&mut self, lane: LaneId, job: Job) {
        let mut priority = 0;
        if let Some(open) = self.ledger.get_mut(&job.request_id) {
            open.started = None;
            priority = open.priority;
        }
        self.lanes.get_mut(lane).queue.put_back(job, priority, Instant::now());
        self.start_next(lane);
    }

    pub fn on_lane_event(&mut self, id: LaneId, event: LaneEvent) {
        self.lanes.get_mut(id).last_event = Instant::now();
        match event {
            LaneEvent::Ready => self.lanes.get_mut(id).ready = true,
            LaneEvent::Unusable(error) => {
                tracing::error!(%error, lane = ?id, "a lane cannot work");
                self.break_down(error);
            }
            LaneEvent::Progress { request_id, progress } => self.progress(&request_id, progress),
            LaneEvent::Done(done) => self.on_done(id, *done),
        }
    }

    /// Fails every request and refuses new ones.
    fn break_down(&mut self, error: Error) {
        let ids: Vec<String> = self.ledger.open().map(|(id, _)| id.to_owned()).collect();
        for id in ids {
            self.remove_from_queues(&id);
            if self.ledger.get(&id).is_some() {
                self.ledger.fail(&id, &error.for_another_request());
            }
        }
        self.draining = true;
        self.broken.get_or_insert(error);
    }

    fn on_done(&mut self, id: LaneId, mut done: Done) {
        self.bar.clear();
        let lane = self.lanes.get_mut(id);
        if lane.running.as_deref() == Some(done.request_id.as_str()) {
            lane.running = None;
        }
        if let Some(fetch) = self.downloads.begin_download(&mut done) {
            self.requeue(LaneId::Hub, fetch);
        } else if let Some(job) = self.downloads.resume(&mut done) {
            self.requeue(LaneId::Compute, job);
        } else {
            self.downloads.forget(&done.request_id);
            self.finish(done);
        }
        self.start_next(id);
    }

    fn finish(&mut self, done: Done) {
        let Done { request_id, result, timings, warnings, engine, .. } = done;
        let result = result.and_then(|reply| {
            serde_json::value::to_raw_value(&reply).map_err(|e| Error::bug(format!("a reply has no JSON form: {e}")))
        });
        let data = match result {
            Ok(data) => data,
            Err(error) => {
                let error = error.without_download();
                self.ledger.fail(&request_id, &error);
                if matches!(error, Error::DeviceLost { .. }) {
                    self.draining = true;
                    self.broken.get_or_insert(error);
                }
                return;
            }
        };
        let now = Instant::now();
        let Some(open) = self.ledger.get_mut(&request_id) else { return };
        let mut report = Timings {
            queue: ms(open.started.unwrap_or(now).saturating_duration_since(open.accepted)),
            total: ms(now.saturating_duration_since(open.accepted)),
            ..Timings::default()
        };
        for (stage, time) in timings {
            report.add(stage, ms(time));
        }
        let mut all = std::mem::take(&mut open.warnings);
        let late: Vec<Warning> = warnings.into_iter().map(|message| Warning::new(message, None)).collect();
        for Warning { message, pointer } in late.clone() {
            self.ledger.event(&request_id, &Event::Warning { message, pointer });
        }
        all.extend(late);
        let engine = EngineReport::new(engine);
        self.ledger.finish(&request_id, Terminal::Result { data, warnings: all, timings: report, engine });
    }

    /// Passes progress on as an event, and draws it for people if the request wants no events.
    fn progress(&mut self, id: &str, progress: Progress) {
        let Some(open) = self.ledger.get_mut(id) else { return };
        let draws = open.events.is_none();
        let event = match progress {
            Progress::Stage { stage } => {
                open.enter(stage, Instant::now());
                Event::Stage { stage: stage.name() }
            }
            Progress::Step { stage, done, total } => {
                let event = open.step(stage, (done, total), Instant::now());
                if stage == Stage::Denoise {
                    self.time_step();
                }
                if draws {
                    self.bar.show(stage.name(), done, total);
                }
                event
            }
            Progress::ModelLoading { component, bytes_done, bytes_total } => {
                Event::ModelLoading { component, bytes_done, bytes_total }
            }
            Progress::Fetching { file, bytes_done, bytes_total } => {
                if draws {
                    let mib = |bytes: Bytes| usize::try_from(bytes.0 / Bytes::MIB).unwrap_or(usize::MAX);
                    self.bar.show("fetch, MiB", mib(bytes_done), mib(bytes_total));
                }
                Event::Fetching { file, bytes_done, bytes_total }
            }
            Progress::Preview { step, png } => {
                Event::Preview { step, base64: base64::engine::general_purpose::STANDARD.encode(&png) }
            }
            Progress::Image { index, path, seed } => {
                self.ledger.counters.images += 1;
                Event::Image { index, path, seed }
            }
        };
        self.ledger.event(id, &event);
    }

    /// Updates the moving average of seconds per step.
    fn time_step(&mut self) {
        let now = Instant::now();
        if let Some(last) = self.last_step.replace(now) {
            let step = now.saturating_duration_since(last).as_secs_f64();
            let mean = &mut self.ledger.counters.seconds_per_step;
            *mean = Some(mean.map_or(step, |mean| 0.8 * mean + 0.2 * step));
        }
    }

    /// Cancels one request, whether it waits or runs.
    pub fn cancel(&mut self, id: &str) -> CancelOutcome {
        self.end(id, &Error::Cancelled)
    }

    /// Ends a waiting request with `error`; one that runs is cancelled.
    fn end(&mut self, id: &str, error: &Error) -> CancelOutcome {
        let Some(open) = self.ledger.get(id) else {
            return if self.ledger.has_finished(id) { CancelOutcome::Finished } else { CancelOutcome::Unknown };
        };
        if open.started.is_some() {
            open.cancel.cancel();
            return CancelOutcome::Running;
        }
        self.remove_from_queues(id);
        self.ledger.fail(id, error);
        CancelOutcome::Queued
    }

    fn remove_from_queues(&mut self, id: &str) {
        for lane in LaneId::ALL {
            drop(self.lanes.get_mut(lane).queue.remove(id));
        }
        self.downloads.forget(id);
    }

    /// Cancels everything; returns how many requests waited and how many ran.
    pub fn cancel_all(&mut self) -> (usize, usize) {
        let ids: Vec<(String, bool)> =
            self.ledger.open().map(|(id, open)| (id.to_owned(), open.started.is_some())).collect();
        for (id, _) in &ids {
            self.cancel(id);
        }
        let running = ids.iter().filter(|(_, runs)| *runs).count();
        (ids.len() - running, running)
    }

    /// Takes no new work. Waiting requests are answered `draining`, to be sent elsewhere; running ones continue.
    pub fn hand_back_queue(&mut self) {
        self.draining = true;
        let waiting: Vec<String> =
            self.ledger.open().filter(|(_, open)| open.started.is_none()).map(|(id, _)| id.to_owned()).collect();
        for id in waiting {
            self.end(&id, &Error::Draining);
        }
    }

    /// Takes no new work and ends once everything accepted has its answer.
    pub fn shut_down(&mut self, mode: OnEof) {
        self.draining = true;
        self.ending = true;
        if mode == OnEof::Cancel {
            self.cancel_all();
        }
    }

    /// Answers waiting requests whose deadline has passed.
    pub fn expire(&mut self) {
        let now = Instant::now();
        let late = |open: &OpenRequest| open.started.is_none() && open.deadline.is_some_and(|deadline| deadline <= now);
        let ids: Vec<String> = self.ledger.open().filter(|(_, open)| late(open)).map(|(id, _)| id.to_owned()).collect();
        for id in ids {
            self.end(&id, &Error::DeadlineExceeded);
        }
    }

    /// Time at which [`Self::expire`] is next due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.ledger.open().filter(|(_, open)| open.started.is_none()).filter_map(|(_, open)| open.deadline).min()
    }

    /// Longest line of input in bytes.
    #[must_use]
    pub fn line_limit(&self) -> usize {
        usize::try_from(self.settings.max_line_bytes.0).unwrap_or(usize::MAX)
    }

    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.ledger.in_flight() == 0
    }

    #[must_use]
    pub fn uptime_ms(&self) -> u64 {
        ms(self.begun.elapsed())
    }
}

/// Lane that a call runs on.
fn lane_of(call: &Call) -> LaneId {
    match () {
        () if call.needs_compute() => LaneId::Compute,
        () if call.needs_network() => LaneId::Hub,
        () => LaneId::Query,
    }
}

fn open_request(head: &Head, warnings: Vec<Warning>, now: Instant) -> OpenRequest {
    OpenRequest {
        worker_type: head.worker_type,
        operation: head.operation.clone(),
        accepted: now,
        started: None,
        deadline: head.timeout_ms.and_then(|timeout| now.checked_add(Duration::from_millis(timeout))),
        priority: head.priority,
        cancel: CancelToken::default(),
        events: head.events,
        shorthand: head.shorthand,
        warnings,
        key: head.idempotency_key.clone(),
        stage: None,
        stage_since: now,
        done: 0,
        total: 0,
    }
}

fn job(head: &Head, call: Call, open: &OpenRequest) -> Job {
    let preview = head.events.and_then(|events| events.preview);
    let preview = preview.map(|keys| PreviewOptions { every: keys.every as usize, max_side: keys.max_side as usize });
    let (request_id, cancel) = (head.request_id.clone(), open.cancel.clone());
    Job { request_id, call, cancel, deadline: open.deadline, preview }
}
