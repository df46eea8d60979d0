//! The event loop: one thread that waits for lines, lanes, deadlines, signals and the end of stdout, but never for work.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::value::to_raw_value;
use tokio::sync::mpsc;

use crate::communication::dispatcher::{Dispatcher, DispatcherParts};
use crate::communication::instructor::CommunicationInstructor;
use crate::communication::interface::PROTOCOL;
use crate::communication::lanes::LaneId;
use crate::communication::ledger::{Ledger, Terminal, ms};
use crate::communication::responses::{EngineReport, Event, Timings};
use crate::communication::signals::Signals;
use crate::communication::workers::codec::{Decoded, RoutedRequest};
use crate::communication::workers::reader::{self, Input};
use crate::communication::workers::writer::{self, Outbox, WriterEvent};
use crate::context::{CancelToken, Context};
use crate::error::{Error, Result};
use crate::managers::Published;
use crate::runtime::config::{MainInterface, OnEof};
use crate::runtime::dispatch;
use crate::runtime::lane::{Build, Lane, LaneEvent};

/// The end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Drained,
    DeviceUnavailable,
    /// The worker can compute nothing any more and should be restarted.
    Poisoned,
    StdoutGone,
    /// Ended at once by the third signal.
    Signal(i32),
}

impl Exit {
    /// The exit code of the protocol.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Drained => 0,
            Self::DeviceUnavailable => 69,
            Self::Poisoned => 70,
            Self::StdoutGone => 74,
            Self::Signal(number) => 128 + number,
        }
    }
}

/// Lines that may wait between the reader's thread and the loop.
const LINES_AHEAD: usize = 16;
/// Time that running work gets to notice that stdout has no reader.
const GRACE: Duration = Duration::from_secs(2);

/// The inputs of [`serve`].
pub struct Setup {
    pub settings: MainInterface,
    /// The private descriptor of the protocol.
    pub stdout: File,
    /// Builds the compute lane's instructors and managers, with the device opened.
    pub compute: Build,
    /// Builds those of the query lane and of the hub lane.
    pub query: Build,
    /// The state of the compute thread that other threads may see.
    pub published: Arc<Published>,
    pub instructor: CommunicationInstructor,
    pub begun: Instant,
}

/// A message of another thread to the loop.
enum Message {
    Lane(LaneId, LaneEvent),
    Writer(WriterEvent),
}

/// Serves until the input has ended and every request is answered, or until a request or signal ends the worker.
///
/// # Errors
/// The system's, if it is out of threads or descriptors.
pub fn serve(setup: Setup) -> io::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { EventLoop::start(setup)?.run().await })
}

struct EventLoop {
    dispatcher: Dispatcher,
    instructor: CommunicationInstructor,
    outbox: Outbox,
    signals: Signals,
    messages: mpsc::UnboundedReceiver<Message>,
    inputs: mpsc::Receiver<Input>,
    input_open: bool,
    signal_count: u32,
    /// Time since which stdout has no reader.
    stdout_gone: Option<Instant>,
}

impl EventLoop {
    /// Starts the writer, the lanes and the reader.
    fn start(setup: Setup) -> io::Result<Self> {
        let Setup { settings, stdout, compute, query, published, instructor, begun } = setup;
        let signals = Signals::listen()?;
        let (sender, messages) = mpsc::unbounded_channel();
        let (give, inputs) = mpsc::channel(LINES_AHEAD);
        let outbox = Outbox::default();
        let send = sender.clone();
        // The receiver is gone only while the process ends.
        writer::spawn(stdout, outbox.clone(), move |event| drop(send.send(Message::Writer(event))))?;
        let lane = |name, id, build| {
            let send = sender.clone();
            Lane::spawn(name, build, move |event| drop(send.send(Message::Lane(id, event))))
        };
        let dispatcher = Dispatcher::new(DispatcherParts {
            begun,
            ledger: Ledger::new(outbox.clone()),
            compute: lane("compute", LaneId::Compute, compute)?,
            hub: lane("hub", LaneId::Hub, Build::clone(&query))?,
            query: lane("query", LaneId::Query, query)?,
            published,
            settings,
        });
        reader::spawn(dispatcher.line_limit(), move |input| give.blocking_send(input).is_ok())?;
        let (input_open, signal_count, stdout_gone) = (true, 0, None);
        Ok(Self { dispatcher, instructor, outbox, signals, messages, inputs, input_open, signal_count, stdout_gone })
    }

    async fn run(mut self) -> io::Result<Exit> {
        let period = self.dispatcher.settings.heartbeat_ms;
        let mut heartbeat = tokio::time::interval(Duration::from_millis(period.max(1)));
        loop {
            if let Some(exit) = self.exit() {
                return Ok(self.close(exit).await);
            }
            let deadline = self.dispatcher.next_deadline();
            let grace = self.stdout_gone.map(|gone| gone + GRACE);
            tokio::select! {
                message = self.messages.recv() => self.on_message(message),
                input = self.inputs.recv(), if self.input_open => self.on_input(input.unwrap_or(Input::End)),
                () = sleep_until(deadline), if deadline.is_some() => self.dispatcher.expire(),
                () = sleep_until(grace), if grace.is_some() => return Ok(Exit::StdoutGone),
                _ = heartbeat.tick(), if period > 0 => self.beat(),
                number = self.signals.next() => {
                    if let Some(exit) = self.on_signal(number) {
                        return Ok(exit);
                    }
                }
            }
        }
    }

    fn on_message(&mut self, message: Option<Message>) {
        match message {
            Some(Message::Lane(id, event)) => {
                let compute_ready = id == LaneId::Compute && matches!(event, LaneEvent::Ready);
                self.dispatcher.on_lane_event(id, event);
                if compute_ready && self.dispatcher.settings.announce {
                    self.dispatcher.ledger.announce(&Event::Ready {
                        version: env!("CARGO_PKG_VERSION"),
                        protocol: PROTOCOL,
                        pid: std::process::id(),
                    });
                }
            }
            Some(Message::Writer(WriterEvent::Gone)) => {
                self.stdout_gone.get_or_insert_with(Instant::now);
                self.dispatcher.shut_down(OnEof::Cancel);
            }
            Some(Message::Writer(WriterEvent::Flushed)) | None => {}
        }
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::Line(line) => {
                if let Some(decoded) = self.dispatcher.receive(&line) {
                    control(&mut self.dispatcher, &self.instructor, decoded);
                }
            }
            Input::TooLong => self.dispatcher.receive_too_long(),
            Input::End => {
                self.input_open = false;
                if self.dispatcher.settings.on_eof == OnEof::Cancel {
                    self.dispatcher.cancel_all();
                }
            }
        }
    }

    fn on_signal(&mut self, number: i32) -> Option<Exit> {
        self.signal_count += 1;
        match self.signal_count {
            1 => {
                self.dispatcher.hand_back_queue();
                self.dispatcher.ending = true;
            }
            2 => self.dispatcher.shut_down(OnEof::Cancel),
            _ => return Some(Exit::Signal(number)),
        }
        None
    }

    fn beat(&self) {
        let dispatcher = &self.dispatcher;
        let queue_depth = dispatcher.lanes.queue_depth();
        dispatcher.ledger.announce(&Event::Heartbeat {
            uptime_ms: dispatcher.uptime_ms(),
            queue_depth,
            running: dispatcher.ledger.in_flight() - queue_depth,
        });
    }

    /// The reason to end, if there is one and nothing is in flight.
    fn exit(&self) -> Option<Exit> {
        if !self.dispatcher.is_idle() {
            return None;
        }
        match &self.dispatcher.broken {
            _ if self.stdout_gone.is_some() => Some(Exit::StdoutGone),
            Some(Error::DeviceUnavailable { .. }) => Some(Exit::DeviceUnavailable),
            Some(_) => Some(Exit::Poisoned),
            None => (self.dispatcher.ending || !self.input_open).then_some(Exit::Drained),
        }
    }

    /// Answers the lines that were read but not looked at, and waits for the last line to be written. Another signal,
    /// or the end of stdout, ends the wait.
    async fn close(mut self, exit: Exit) -> Exit {
        self.dispatcher.draining = true;
        while let (true, Ok(input)) = (self.input_open, self.inputs.try_recv()) {
            self.on_input(input);
        }
        if self.stdout_gone.is_some() {
            return exit;
        }
        self.outbox.close();
        loop {
            tokio::select! {
                message = self.messages.recv() => match message {
                    Some(Message::Writer(WriterEvent::Flushed)) | None => return exit,
                    Some(Message::Writer(WriterEvent::Gone)) => return Exit::StdoutGone,
                    Some(Message::Lane(..)) => {}
                },
                number = self.signals.next() => return Exit::Signal(number),
            }
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline.into()).await;
    }
}

/// Answers a control operation at once.
fn control(dispatcher: &mut Dispatcher, instructor: &CommunicationInstructor, decoded: Decoded) {
    let Decoded { head, request: RoutedRequest::Control(request), warnings, .. } = decoded else { return };
    let begun = Instant::now();
    let ctx = Context::new(head.request_id.clone(), CancelToken::default(), None, None, Box::new(|_| ()));
    let answer: Result<_> = dispatch::run(instructor, *request, dispatcher, &ctx).and_then(|response| {
        to_raw_value(&response).map_err(|e| Error::bug(format!("a response has no JSON form: {e}")))
    });
    match answer {
        Ok(data) => {
            let timings = Timings { total: ms(begun.elapsed()), ..Timings::default() };
            let terminal = Terminal::Result { data, warnings, timings, engine: EngineReport::new(None) };
            dispatcher.ledger.answer(&head.request_id, &terminal);
        }
        Err(error) => dispatcher.ledger.refuse(&head.request_id, &error.into(), head.shorthand),
    }
}
