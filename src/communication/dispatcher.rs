//! The floor between the wire and the lanes: admission, the two queues, deadlines, cancellation, and what lanes say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;

use crate::communication::interface::{EventOptions, Found, Head};
use crate::communication::ledger::{Known, Ledger, Open, Terminal, ms};
use crate::communication::pending_downloads::PendingDownloads;
use crate::communication::queue::Queue;
use crate::communication::responses::{Engine, Event, Timings, Warning};
use crate::communication::workers::bar::Bar;
use crate::communication::workers::codec::{self, Ask, Decoded, Fault};
use crate::context::{CancelToken, PreviewOptions, Progress, Stage};
use crate::error::Error;
use crate::managers::Published;
use crate::runtime::config::{MainInterface, OnEof};
use crate::runtime::dispatch::Call;
use crate::runtime::lane::{self, Done, Job, Lane};
use crate::units::Bytes;

/// Which of the three threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Post {
    /// Makes images, one at a time.
    Compute,
    /// Answers what needs no compute, also while an image is made.
    QueryLane,
    /// Answers what waits for the network, also while the others work.
    Hub,
}

/// A lane with what waits for it.
pub struct Station {
    pub lane: Lane,
    pub queue: Queue,
    pub running: Option<String>,
    pub ready: bool,
    /// When the lane last said something.
    pub heard: Instant,
}

impl Station {
    #[must_use]
    pub fn new(lane: Lane, limit: usize) -> Self {
        Self { lane, queue: Queue::new(limit), running: None, ready: false, heard: Instant::now() }
    }
}

/// Everything that control operations may see and change.
pub struct Floor {
    pub settings: MainInterface,
    pub begun: Instant,
    pub ledger: Ledger,
    pub compute: Station,
    pub desk: Station,
    pub hub: Station,
    /// New work is refused.
    pub draining: bool,
    /// The process ends as soon as nothing is in flight.
    pub ending: bool,
    /// A lane could not be built, or its device is lost.
    pub broken: Option<Error>,
    pub bar: Bar,
    pub published: Arc<Published>,
    pub(crate) parked: PendingDownloads,
    last_step: Option<Instant>,
}

/// The parts of [`Floor`] that its maker chooses.
pub struct Parts {
    pub settings: MainInterface,
    pub begun: Instant,
    pub ledger: Ledger,
    pub compute: Lane,
    pub desk: Lane,
    pub hub: Lane,
    pub published: Arc<Published>,
}

impl Floor {
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts { settings, begun, ledger, compute, desk, hub, published } = parts;
        let limit = settings.queue_limit;
        Self {
            settings,
            begun,
            ledger,
            compute: Station::new(compute, limit),
            desk: Station::new(desk, limit),
            hub: Station::new(hub, limit),
            draining: false,
            ending: false,
            broken: None,
            bar: Bar::on_stderr(),
            published,
            parked: PendingDownloads::default(),
            last_step: None,
        }
    }

    pub(crate) fn station(&mut self, post: Post) -> &mut Station {
        match post {
            Post::Compute => &mut self.compute,
            Post::QueryLane => &mut self.desk,
            Post::Hub => &mut self.hub,
        }
    }

    /// Every station, the one that makes images first.
    #[must_use]
    pub fn stations(&self) -> [&Station; 3] {
        [&self.compute, &self.desk, &self.hub]
    }

    /// Takes a line. What the lanes have no part in is handed back with its head, to be answered at once.
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
        match decoded.ask {
            Ask::Control(_) => Some(decoded),
            Ask::Call(call) => {
                let Decoded { head, warnings, fingerprint, .. } = decoded;
                if let Err(error) = self.admit(&head, *call, warnings, fingerprint) {
                    let pointer = matches!(error, Error::InvalidRequest { .. }).then(|| error.pointer()).flatten();
                    self.ledger.refuse(&head.request_id, &Fault { error: error.into(), pointer }, head.shorthand);
                }
                None
            }
        }
    }

    /// A line beyond the limit.
    pub fn receive_too_long(&mut self) {
        self.ledger.counters.lines += 1;
        let id = self.ledger.auto_id();
        let error = Error::LineTooLong { limit: self.line_limit() };
        self.ledger.refuse(&id, &Fault { error: error.into(), pointer: None }, false);
    }

    fn duplicate(&self, request_id: &str) -> Option<Fault> {
        self.ledger.get(request_id).map(|_| {
            let error = Error::DuplicateRequestId { request_id: request_id.to_owned() };
            Fault { error: error.into(), pointer: Some("/request_id".to_owned()) }
        })
    }

    fn admit(&mut self, head: &Head, call: Call, warnings: Vec<Warning>, fingerprint: u64) -> Result<(), Error> {
        let now = Instant::now();
        let id = head.request_id.as_str();
        let post = match () {
            () if call.needs_compute() => Post::Compute,
            () if call.needs_network() => Post::Hub,
            () => Post::QueryLane,
        };
        if let Some(error) = &self.broken {
            return Err(error.retold());
        }
        if self.draining {
            return Err(Error::Draining);
        }
        let limit = self.settings.queue_limit;
        let mut attached = false;
        if let Some(key) = &head.idempotency_key {
            match self.ledger.claim_key(key, fingerprint, id, limit) {
                Known::First => {}
                Known::Attached => attached = true,
                Known::Answered(terminal) => {
                    self.ledger.answer(id, &terminal);
                    return Ok(());
                }
                Known::Full => return Err(Error::QueueFull { limit }),
                Known::Mismatch => {
                    return Err(Error::InvalidRequest {
                        message: format!("`idempotency_key` `{key}` belongs to a request with other data"),
                        pointer: Some("/idempotency_key".to_owned()),
                        hint: Some("use a new key for a new request".to_owned()),
                    });
                }
            }
        }
        let open = Open {
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
        };
        let mut position = 0;
        if !attached {
            let preview = head.events.and_then(|options: EventOptions| options.preview);
            let preview =
                preview.map(|keys| PreviewOptions { every: keys.every as usize, max_side: keys.max_side as usize });
            let job =
                Job { request_id: id.to_owned(), call, cancel: open.cancel.clone(), deadline: open.deadline, preview };
            let station = self.station(post);
            // An idle lane takes the job at once, so a limit of 0 still lets one request run.
            let placed = if station.running.is_none() && station.queue.is_empty() {
                station.running = Some(id.to_owned());
                station.heard = now;
                station.lane.submit(job).map(|()| None).map_err(|_| Error::bug("the lane has ended"))
            } else {
                station.queue.push(job, head.priority, now).map(|ahead| Some(ahead + 1))
            };
            match placed {
                Ok(place) => position = place.unwrap_or(0),
                Err(error) => {
                    if let Some(key) = &head.idempotency_key {
                        self.ledger.release_key(key);
                    }
                    return Err(error);
                }
            }
        }
        let warned = open.warnings.clone();
        self.ledger.accept(id, open);
        self.ledger.event(id, &Event::Accepted { position });
        for Warning { message, pointer } in warned {
            self.ledger.event(id, &Event::Warning { message, pointer });
        }
        if self.station(post).running.as_deref() == Some(id) {
            self.begin(id);
        }
        Ok(())
    }

    fn begin(&mut self, id: &str) {
        if let Some(open) = self.ledger.get_mut(id) {
            open.started = Some(Instant::now());
        }
        if self.compute.running.as_deref() == Some(id) {
            self.last_step = None;
        }
        if !self.parked.holds(id) {
            self.ledger.event(id, &Event::Started);
        }
    }

    /// Gives an idle lane its next job.
    pub(crate) fn pump(&mut self, post: Post) {
        let station = self.station(post);
        if station.running.is_some() {
            return;
        }
        let Some(job) = station.queue.take(Instant::now()) else { return };
        let id = job.request_id.clone();
        if station.lane.submit(job).is_err() {
            self.ledger.fail(&id, &Error::bug("the lane has ended"));
            return self.pump(post);
        }
        station.running = Some(id.clone());
        station.heard = Instant::now();
        self.begin(&id);
    }

    /// What a lane says.
    pub fn hear(&mut self, post: Post, event: lane::Event) {
        self.station(post).heard = Instant::now();
        match event {
            lane::Event::Ready => self.station(post).ready = true,
            lane::Event::Unusable(error) => {
                tracing::error!(%error, ?post, "a lane cannot work");
                let ids: Vec<String> = self.ledger.open().map(|(id, _)| id.to_owned()).collect();
                for id in ids {
                    self.take_from_queues(&id);
                    if self.ledger.get(&id).is_some() {
                        self.ledger.fail(&id, &error.retold());
                    }
                }
                self.draining = true;
                self.broken.get_or_insert(error);
            }
            lane::Event::Progress { request_id, progress } => self.progress(&request_id, progress),
            lane::Event::Done(mut done) => {
                self.bar.clear();
                let station = self.station(post);
                if station.running.as_deref() == Some(done.request_id.as_str()) {
                    station.running = None;
                }
                if !self.park(&mut done) && !self.unpark(&mut done) {
                    self.parked.forget(&done.request_id);
                    self.finish(*done);
                }
                self.pump(post);
            }
        }
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
        let mut told = Timings {
            queue: ms(open.started.unwrap_or(now).saturating_duration_since(open.accepted)),
            total: ms(now.saturating_duration_since(open.accepted)),
            ..Timings::default()
        };
        for (stage, time) in timings {
            told.add(stage, ms(time));
        }
        let mut all = std::mem::take(&mut open.warnings);
        let late: Vec<Warning> = warnings.into_iter().map(|message| Warning::new(message, None)).collect();
        for Warning { message, pointer } in late.clone() {
            self.ledger.event(&request_id, &Event::Warning { message, pointer });
        }
        all.extend(late);
        let engine = Engine {
            version: env!("CARGO_PKG_VERSION"),
            device: engine.as_ref().map(|engine| engine.device.clone()),
            dtype: engine.as_ref().map(|engine| engine.dtype),
            quantization: engine.map(|engine| engine.quantization),
        };
        self.ledger.finish(&request_id, Terminal::Result { data, warnings: all, timings: told, engine });
    }

    fn progress(&mut self, id: &str, progress: Progress) {
        let now = Instant::now();
        let Some(open) = self.ledger.get_mut(id) else { return };
        let event = match progress {
            Progress::Stage { stage } => {
                open.enter(stage, now);
                Event::Stage { stage: stage.name() }
            }
            Progress::Step { stage, done, total } => {
                if open.stage != Some(stage.name()) {
                    open.enter(stage, now);
                }
                (open.done, open.total) = (done, total);
                let seconds = now.saturating_duration_since(open.stage_since).as_secs_f64();
                let rate = Some(done as f64 / seconds).filter(|rate| rate.is_finite() && *rate > 0.0);
                let left = total.saturating_sub(done) as f64;
                if stage == Stage::Denoise
                    && let Some(last) = self.last_step.replace(now)
                {
                    let step = now.saturating_duration_since(last).as_secs_f64();
                    let mean = &mut self.ledger.counters.seconds_per_step;
                    *mean = Some(mean.map_or(step, |mean| 0.8 * mean + 0.2 * step));
                }
                if self.ledger.get(id).is_some_and(|open| open.events.is_none()) {
                    self.bar.show(stage.name(), done, total);
                }
                Event::Progress {
                    stage: stage.name(),
                    done,
                    total,
                    it_per_s: rate,
                    // A float cast saturates, which is what an estimate beyond all measure should do.
                    eta_ms: rate.map(|rate| (left / rate * 1000.0) as u64),
                }
            }
            Progress::ModelLoading { component, bytes_done, bytes_total } => {
                Event::ModelLoading { component, bytes_done, bytes_total }
            }
            Progress::Fetching { file, bytes_done, bytes_total } => {
                if open.events.is_none() {
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

    /// Cancels one request, wherever it is.
    pub fn cancel(&mut self, id: &str) -> Found {
        self.end(id, &Error::Cancelled)
    }

    fn end(&mut self, id: &str, error: &Error) -> Found {
        let Some(open) = self.ledger.get(id) else {
            return if self.ledger.has_finished(id) { Found::Finished } else { Found::Unknown };
        };
        if open.started.is_some() {
            open.cancel.cancel();
            return Found::Running;
        }
        self.take_from_queues(id);
        self.ledger.fail(id, error);
        Found::Queued
    }

    fn take_from_queues(&mut self, id: &str) {
        for post in [Post::Compute, Post::QueryLane, Post::Hub] {
            drop(self.station(post).queue.remove(id));
        }
        self.parked.forget(id);
    }

    /// Cancels everything, and says how many waited and how many ran.
    pub fn cancel_all(&mut self) -> (usize, usize) {
        let ids: Vec<(String, bool)> =
            self.ledger.open().map(|(id, open)| (id.to_owned(), open.started.is_some())).collect();
        for (id, _) in &ids {
            self.cancel(id);
        }
        let running = ids.iter().filter(|(_, runs)| *runs).count();
        (ids.len() - running, running)
    }

    /// Takes no new work; what waits is handed back to be sent elsewhere, what runs goes on.
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

    /// Answers what has waited beyond its deadline.
    pub fn expire(&mut self) {
        let now = Instant::now();
        let late = |open: &Open| open.started.is_none() && open.deadline.is_some_and(|deadline| deadline <= now);
        let ids: Vec<String> = self.ledger.open().filter(|(_, open)| late(open)).map(|(id, _)| id.to_owned()).collect();
        for id in ids {
            self.end(&id, &Error::DeadlineExceeded);
        }
    }

    /// When [`Self::expire`] is next due.
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
