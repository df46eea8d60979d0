//! The only writer of stdout: whole lines, flushed one by one. Terminal lines are never dropped. Progress that has not
//! been written yet is replaced by newer progress; other events are dropped and counted when too many wait.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::communication::responses::{Event, EventLine, EventTag};
use crate::communication::workers::descriptor;

/// Events that may wait before they are dropped.
const MAX_EVENTS: usize = 1024;
/// Bytes of events that may wait before they are dropped.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// An event of the writer itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriterEvent {
    /// stdout has no reader any more.
    Gone,
    /// The outbox is closed and every line is written.
    Flushed,
}

/// Lines to be written to stdout.
#[derive(Clone, Default)]
pub struct Outbox(Arc<(Mutex<OutboxState>, Condvar)>);

#[derive(Default)]
struct OutboxState {
    lines: VecDeque<String>,
    /// Number of lines taken so far, which is the number of the first line that waits.
    taken: u64,
    events: usize,
    event_bytes: usize,
    streams: HashMap<String, EventStream>,
    dropped: u64,
    closed: bool,
}

/// The events of one request.
#[derive(Default)]
struct EventStream {
    seq: u64,
    dropped: u64,
    /// Number of the line with this request's last event, if that is progress.
    progress: Option<u64>,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, OutboxState> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an event of a request, or of the worker itself.
    pub fn event(&self, request_id: Option<&str>, event: &Event) {
        self.lock().event(request_id, event);
        self.0.1.notify_one();
    }

    /// Queues the terminal line of a request, which ends its events.
    pub fn terminal(&self, request_id: &str, line: String) {
        let mut waiting = self.lock();
        waiting.report_drops(request_id);
        waiting.streams.remove(request_id);
        waiting.push(line, false);
        drop(waiting);
        self.0.1.notify_one();
    }

    /// Queues a line that ends no request's events.
    pub fn line(&self, line: String) {
        self.lock().push(line, false);
        self.0.1.notify_one();
    }

    /// Events dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Closes the outbox: no more lines will come.
    pub fn close(&self) {
        self.lock().closed = true;
        self.0.1.notify_one();
    }

    /// Waits for lines and takes all of them, as bytes; `None` once the outbox is closed and empty.
    fn take(&self) -> Option<Vec<u8>> {
        let mut waiting = self.lock();
        while waiting.lines.is_empty() {
            if waiting.closed {
                return None;
            }
            waiting = self.0.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let mut bytes = Vec::new();
        while let Some(line) = waiting.lines.pop_front() {
            waiting.taken += 1;
            bytes.extend_from_slice(line.as_bytes());
            bytes.push(b'\n');
        }
        waiting.events = 0;
        waiting.event_bytes = 0;
        Some(bytes)
    }
}

impl OutboxState {
    fn event(&mut self, request_id: Option<&str>, event: &Event) {
        let id = request_id.unwrap_or_default();
        let stream = self.streams.entry(id.to_owned()).or_default();
        let is_progress = matches!(event, Event::Progress { .. });
        let waits = stream.progress.filter(|number| *number >= self.taken);
        if let (true, Some(number), true) = (is_progress, waits, stream.dropped == 0) {
            let seq = stream.seq.saturating_sub(1);
            let text = event_line(request_id, seq, event);
            let index = usize::try_from(number - self.taken).unwrap_or(usize::MAX);
            if let (Some(line), Some(text)) = (self.lines.get_mut(index), text) {
                self.event_bytes = self.event_bytes + text.len() - line.len().min(self.event_bytes);
                *line = text;
            }
            return;
        }
        if self.events >= MAX_EVENTS || self.event_bytes >= MAX_EVENT_BYTES {
            stream.dropped += 1;
            self.dropped += 1;
            return;
        }
        self.report_drops(id);
        self.push_event(request_id, event);
        let number = self.taken + self.lines.len() as u64 - 1;
        if let Some(stream) = self.streams.get_mut(id) {
            stream.progress = is_progress.then_some(number);
        }
    }

    /// Queues the number of dropped events of a request, before its next line.
    fn report_drops(&mut self, id: &str) {
        let count = self.streams.get_mut(id).map_or(0, |stream| std::mem::take(&mut stream.dropped));
        if count > 0 {
            self.push_event(Some(id).filter(|id| !id.is_empty()), &Event::Dropped { count });
        }
    }

    fn push_event(&mut self, request_id: Option<&str>, event: &Event) {
        let stream = self.streams.entry(request_id.unwrap_or_default().to_owned()).or_default();
        let seq = stream.seq;
        if let Some(text) = event_line(request_id, seq, event) {
            stream.seq += 1;
            self.push(text, true);
        }
    }

    fn push(&mut self, text: String, is_event: bool) {
        if is_event {
            self.events += 1;
            self.event_bytes += text.len();
        }
        self.lines.push_back(text);
    }
}

fn event_line(request_id: Option<&str>, seq: u64, event: &Event) -> Option<String> {
    let line = EventLine { r#type: EventTag::Event, request_id, seq, event };
    serde_json::to_string(&line).inspect_err(|error| tracing::error!(%error, "an event has no JSON form")).ok()
}

/// Writes `outbox` to `stdout` on a new thread, and watches on another for the reader to leave.
///
/// # Errors
/// The system's, if it is out of threads or descriptors.
pub fn spawn(stdout: File, outbox: Outbox, notify: impl Fn(WriterEvent) + Clone + Send + 'static) -> io::Result<()> {
    let watched = stdout.try_clone()?;
    let gone = notify.clone();
    std::thread::Builder::new().name("stdout-watch".to_owned()).spawn(move || {
        if descriptor::wait_for_hangup(&watched).is_ok_and(|hung_up| hung_up) {
            gone(WriterEvent::Gone);
        }
    })?;
    std::thread::Builder::new().name("stdout".to_owned()).spawn(move || {
        let mut stdout = stdout;
        while let Some(bytes) = outbox.take() {
            if let Err(error) = write(&mut stdout, &bytes) {
                tracing::error!(%error, "stdout cannot be written");
                return notify(WriterEvent::Gone);
            }
        }
        notify(WriterEvent::Flushed);
    })?;
    Ok(())
}

fn write(stdout: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stdout.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // An inherited descriptor may be non-blocking.
            Err(e) if e.kind() == ErrorKind::WouldBlock => descriptor::wait_writable(stdout)?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
