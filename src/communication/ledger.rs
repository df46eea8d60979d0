//! The ledger of requests that are owed an answer. Every non-blank line of input gets exactly one terminal line, and
//! nothing follows it under the same id.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use serde_json::value::RawValue;

use crate::communication::interface::EventOptions;
use crate::communication::responses::{
    EngineReport, ErrorBody, ErrorLine, ErrorTag, Event, ResultLine, ResultTag, Timings, Warning,
};
use crate::communication::workers::codec::fault::Fault;
use crate::communication::workers::writer::Outbox;
use crate::context::{CancelToken, Stage};
use crate::error::Error;
use crate::layers::Domain;

/// Ids of finished requests that `cancel` still finds.
const MAX_FINISHED: usize = 4096;
/// Answers remembered under an idempotency key.
const MAX_REMEMBERED: usize = 1024;
/// Bytes of such answers.
const MAX_REMEMBERED_BYTES: usize = 64 << 20;

/// An accepted request that is owed an answer.
pub struct OpenRequest {
    pub worker_type: Domain,
    pub operation: String,
    pub accepted: Instant,
    pub started: Option<Instant>,
    pub deadline: Option<Instant>,
    pub priority: i64,
    pub cancel: CancelToken,
    pub events: Option<EventOptions>,
    pub shorthand: bool,
    pub warnings: Vec<Warning>,
    pub key: Option<String>,
    pub stage: Option<&'static str>,
    pub stage_since: Instant,
    pub done: usize,
    pub total: usize,
}

impl OpenRequest {
    /// Begins a stage.
    pub fn enter(&mut self, stage: Stage, now: Instant) {
        self.stage = Some(stage.name());
        self.stage_since = now;
        self.done = 0;
        self.total = 0;
    }

    /// Records `done` of `total` steps of a stage, and returns their progress event.
    pub fn step(&mut self, stage: Stage, (done, total): (usize, usize), now: Instant) -> Event {
        if self.stage != Some(stage.name()) {
            self.enter(stage, now);
        }
        (self.done, self.total) = (done, total);
        let seconds = now.saturating_duration_since(self.stage_since).as_secs_f64();
        let rate = Some(done as f64 / seconds).filter(|rate| rate.is_finite() && *rate > 0.0);
        let left = total.saturating_sub(done) as f64;
        Event::Progress {
            stage: stage.name(),
            done,
            total,
            it_per_s: rate,
            // A float cast saturates, as an estimate beyond all measure should.
            eta_ms: rate.map(|rate| (left / rate * 1000.0) as u64),
        }
    }
}

/// An answer without the id of its request.
#[derive(Clone)]
pub enum Terminal {
    Result { data: Box<RawValue>, warnings: Vec<Warning>, timings: Timings, engine: EngineReport },
    Error(ErrorBody),
}

impl Terminal {
    fn bytes(&self) -> usize {
        match self {
            Self::Result { data, .. } => data.get().len(),
            Self::Error(body) => body.message.len(),
        }
    }

    fn line(&self, request_id: &str) -> String {
        let line = match self {
            Self::Result { data, warnings, timings, engine } => serde_json::to_string(&ResultLine {
                r#type: ResultTag::Result,
                request_id,
                success: true,
                data,
                warnings,
                timings_ms: timings,
                engine,
            }),
            Self::Error(error) => {
                serde_json::to_string(&ErrorLine { r#type: ErrorTag::Error, request_id, success: false, error })
            }
        };
        // Structs with string keys always have a JSON form.
        line.unwrap_or_default()
    }

    /// True if the same request would end like this again.
    fn is_repeatable(&self) -> bool {
        // Errors depend on the world: a missing file, a full disk.
        matches!(self, Self::Result { .. })
    }
}

/// The result of claiming an idempotency key.
pub enum KeyClaim {
    /// The request is the first with the key.
    First,
    /// The first is in flight; this request shares its answer.
    Attached,
    /// The first was answered.
    Answered(Box<Terminal>),
    /// The key belongs to a request with other data.
    Mismatch,
    /// As many requests as allowed wait for the first.
    Full,
}

enum KeyState {
    InFlight { leader: String, fingerprint: u64, followers: Vec<String> },
    Answered { fingerprint: u64, terminal: Box<Terminal> },
}

/// Counts since the start.
#[derive(Default)]
pub struct Counters {
    pub lines: u64,
    pub accepted: u64,
    pub finished: u64,
    pub failed: BTreeMap<&'static str, u64>,
    pub images: u64,
    pub seconds_per_step: Option<f64>,
}

pub struct Ledger {
    outbox: Outbox,
    open: HashMap<String, OpenRequest>,
    finished: HashSet<String>,
    finished_order: VecDeque<String>,
    keys: HashMap<String, KeyState>,
    key_order: VecDeque<String>,
    key_bytes: usize,
    bugs: u64,
    pub counters: Counters,
}

impl Ledger {
    #[must_use]
    pub fn new(outbox: Outbox) -> Self {
        Self {
            outbox,
            open: HashMap::new(),
            finished: HashSet::new(),
            finished_order: VecDeque::new(),
            keys: HashMap::new(),
            key_order: VecDeque::new(),
            key_bytes: 0,
            bugs: 0,
            counters: Counters::default(),
        }
    }

    #[must_use]
    pub fn get(&self, request_id: &str) -> Option<&OpenRequest> {
        self.open.get(request_id)
    }

    pub fn get_mut(&mut self, request_id: &str) -> Option<&mut OpenRequest> {
        self.open.get_mut(request_id)
    }

    #[must_use]
    pub fn has_finished(&self, request_id: &str) -> bool {
        self.finished.contains(request_id)
    }

    /// Requests that are owed an answer.
    pub fn open(&self) -> impl Iterator<Item = (&str, &OpenRequest)> {
        self.open.iter().map(|(id, open)| (id.as_str(), open))
    }

    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    #[must_use]
    pub fn dropped_events(&self) -> u64 {
        self.outbox.dropped()
    }

    /// An id for a line without one: the number of the line, with a suffix if that is taken.
    #[must_use]
    pub fn auto_id(&self) -> String {
        let id = format!("auto-{}", self.counters.lines);
        let taken = |id: &String| self.open.contains_key(id) || self.finished.contains(id);
        if !taken(&id) {
            return id;
        }
        (1_u64..).map(|n| format!("{id}.{n}")).find(|id| !taken(id)).unwrap_or(id)
    }

    /// Accepts a request, which is owed an answer from here on.
    pub fn accept(&mut self, request_id: &str, open: OpenRequest) {
        self.counters.accepted += 1;
        self.open.insert(request_id.to_owned(), open);
    }

    /// Looks up an idempotency key and claims it if it is free.
    pub fn claim_key(&mut self, key: &str, fingerprint: u64, request_id: &str, limit: usize) -> KeyClaim {
        match self.keys.get_mut(key) {
            None => {
                let state = KeyState::InFlight { leader: request_id.to_owned(), fingerprint, followers: Vec::new() };
                self.keys.insert(key.to_owned(), state);
                KeyClaim::First
            }
            Some(KeyState::InFlight { fingerprint: first, .. } | KeyState::Answered { fingerprint: first, .. })
                if *first != fingerprint =>
            {
                KeyClaim::Mismatch
            }
            Some(KeyState::InFlight { followers, .. }) if followers.len() >= limit => KeyClaim::Full,
            Some(KeyState::InFlight { followers, .. }) => {
                followers.push(request_id.to_owned());
                KeyClaim::Attached
            }
            Some(KeyState::Answered { terminal, .. }) => KeyClaim::Answered(terminal.clone()),
        }
    }

    /// Releases a key whose request was not accepted after all.
    pub fn release_key(&mut self, key: &str) {
        self.keys.remove(key);
    }

    /// Emits an event, if the request wants events of this kind.
    pub fn event(&self, request_id: &str, event: &Event) {
        let Some(options) = self.open.get(request_id).and_then(|open| open.events) else { return };
        let wanted = match event {
            Event::Progress { .. } => options.progress,
            Event::Preview { .. } => options.preview.is_some(),
            _ => true,
        };
        if wanted {
            self.outbox.event(Some(request_id), event);
        }
    }

    /// Emits an event that belongs to no request.
    pub fn announce(&self, event: &Event) {
        self.outbox.event(None, event);
    }

    /// Answers a line that is owed nothing beyond this.
    pub fn answer(&mut self, request_id: &str, terminal: &Terminal) {
        self.count(terminal);
        let line = terminal.line(request_id);
        if self.open.contains_key(request_id) {
            self.outbox.line(line);
        } else {
            self.outbox.terminal(request_id, line);
            self.note_finished(request_id);
        }
    }

    /// Answers a line that was not accepted.
    pub fn refuse(&mut self, request_id: &str, fault: &Fault, shorthand: bool) {
        let mut body = self.body(&fault.error, request_id);
        match &fault.pointer {
            Some(pointer) => body.pointer = Some(pointer.clone()).filter(|pointer| pointer.len() <= 1024),
            None if shorthand => relocate(&mut body),
            None => {}
        }
        self.answer(request_id, &Terminal::Error(body));
    }

    /// Ends an accepted request with an error.
    pub fn fail(&mut self, request_id: &str, error: &Error) {
        let mut body = self.body(error, request_id);
        if self.open.get(request_id).is_some_and(|open| open.shorthand) {
            relocate(&mut body);
        }
        self.finish(request_id, Terminal::Error(body));
    }

    /// Ends an accepted request and all that share its answer.
    pub fn finish(&mut self, request_id: &str, terminal: Terminal) {
        let Some(open) = self.open.remove(request_id) else {
            tracing::error!(request_id, "an answer for a request that is owed none was dropped");
            return;
        };
        self.answer(request_id, &terminal);
        let Some(key) = open.key else { return };
        match self.keys.get_mut(&key) {
            Some(KeyState::InFlight { leader, followers, .. }) if leader != request_id => {
                followers.retain(|follower| follower != request_id);
            }
            Some(KeyState::InFlight { .. }) => {
                let Some(KeyState::InFlight { fingerprint, followers, .. }) = self.keys.remove(&key) else { return };
                for follower in followers {
                    self.open.remove(&follower);
                    self.answer(&follower, &terminal);
                }
                if terminal.is_repeatable() {
                    self.remember(key, fingerprint, terminal);
                }
            }
            Some(KeyState::Answered { .. }) | None => {}
        }
    }

    fn remember(&mut self, key: String, fingerprint: u64, terminal: Terminal) {
        self.key_bytes += terminal.bytes();
        self.key_order.push_back(key.clone());
        self.keys.insert(key, KeyState::Answered { fingerprint, terminal: Box::new(terminal) });
        while self.key_order.len() > MAX_REMEMBERED || self.key_bytes > MAX_REMEMBERED_BYTES {
            let Some(oldest) = self.key_order.pop_front() else { return };
            if let Some(KeyState::Answered { terminal, .. }) = self.keys.remove(&oldest) {
                self.key_bytes = self.key_bytes.saturating_sub(terminal.bytes());
            }
        }
    }

    fn note_finished(&mut self, request_id: &str) {
        if self.finished.insert(request_id.to_owned()) {
            self.finished_order.push_back(request_id.to_owned());
        }
        while self.finished_order.len() > MAX_FINISHED {
            if let Some(oldest) = self.finished_order.pop_front() {
                self.finished.remove(&oldest);
            }
        }
    }

    fn count(&mut self, terminal: &Terminal) {
        match terminal {
            Terminal::Result { .. } => self.counters.finished += 1,
            Terminal::Error(body) => *self.counters.failed.entry(body.code).or_default() += 1,
        }
    }

    /// The error in its wire form. An internal one gets a `bug_id`, under which the log has the details.
    fn body(&mut self, error: &Error, request_id: &str) -> ErrorBody {
        let mut body = ErrorBody::from(error);
        if body.code == "internal" {
            self.bugs += 1;
            let bug_id = format!("{:x}-{}", std::process::id(), self.bugs);
            tracing::error!(bug_id, request_id, error = ?error, "internal error");
            body.bug_id = Some(bug_id);
        }
        body
    }
}

/// Whole milliseconds.
#[must_use]
pub fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Moves the pointer to the top of the line, where a shorthand line has the fields of `data`.
fn relocate(body: &mut ErrorBody) {
    if let Some(rest) = body.pointer.as_deref().and_then(|pointer| pointer.strip_prefix("/data")) {
        body.pointer = Some(rest.to_owned());
    }
}
