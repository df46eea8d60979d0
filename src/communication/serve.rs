//! The event loop: one thread that waits for lines, lanes, deadlines, signals and the end of stdout, and never for work.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::value::to_raw_value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::communication::dispatcher::{Floor, Parts, Post};
use crate::communication::instructor::{CommunicationInstructor, queue_depth};
use crate::communication::interface::PROTOCOL;
use crate::communication::ledger::{Ledger, Terminal};
use crate::communication::responses::{Engine, Event, Timings};
use crate::communication::workers::codec::{Ask, Decoded, Fault};
use crate::communication::workers::reader::{self, Input};
use crate::communication::workers::writer::{self, Note, Outbox};
use crate::context::{CancelToken, Context};
use crate::error::{Error, Result};
use crate::managers::Published;
use crate::runtime::config::{MainInterface, OnEof};
use crate::runtime::dispatch;
use crate::runtime::lane::{self, Build, Lane};

/// How the process ends; the numbers are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Drained,
    DeviceUnavailable,
    /// The worker can compute nothing any more; start another.
    Poisoned,
    StdoutGone,
    /// Ended by the third signal, at once.
    Signal(i32),
}

impl Exit {
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
/// How long running work may take to notice that nobody listens any more.
const GRACE: Duration = Duration::from_secs(2);

/// What the loop needs of its maker.
pub struct Setup {
    pub settings: MainInterface,
    /// The private descriptor of the protocol.
    pub stdout: File,
    /// Makes what the compute thread owns, its device opened.
    pub compute: Build,
    /// Makes what the desk owns, and what the thread owns that waits for the network.
    pub desk: Build,
    /// What the compute thread lets others see.
    pub published: Arc<Published>,
    pub instructor: CommunicationInstructor,
    pub begun: Instant,
}

/// What other threads tell the loop.
enum Word {
    Lane(Post, lane::Event),
    Writer(Note),
}

/// Serves until the input has ended and everything is answered, or until it is told to end.
///
/// # Errors
/// The system's, when threads or descriptors have run out.
pub fn serve(setup: Setup) -> io::Result<Exit> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(setup))
}

async fn run(setup: Setup) -> io::Result<Exit> {
    let Setup { settings, stdout, compute, desk, published, instructor, begun } = setup;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, mut words) = mpsc::unbounded_channel();
    let (give, mut inputs) = mpsc::channel(LINES_AHEAD);
    let outbox = Outbox::default();
    let say = tell.clone();
    // A word that nobody hears any more is one said while the process ends.
    writer::spawn(stdout, outbox.clone(), move |note| drop(say.send(Word::Writer(note))))?;
    let lane = |name, post, build| {
        let say = tell.clone();
        Lane::spawn(name, build, move |event| drop(say.send(Word::Lane(post, event))))
    };
    let mut floor = Floor::new(Parts {
        begun,
        ledger: Ledger::new(outbox.clone()),
        compute: lane("compute", Post::Compute, compute)?,
        hub: lane("hub", Post::Hub, Build::clone(&desk))?,
        desk: lane("desk", Post::QueryLane, desk)?,
        published,
        settings,
    });
    reader::spawn(floor.line_limit(), move |input| give.blocking_send(input).is_ok())?;
    let mut heartbeat = tokio::time::interval(Duration::from_millis(floor.settings.heartbeat_ms.max(1)));
    let mut state = State { input_open: true, signals: 0, gone: None };
    loop {
        if let Some(exit) = state.exit(&floor) {
            state.close(&mut floor, &instructor, &mut inputs);
            if state.gone.is_some() {
                return Ok(exit);
            }
            outbox.close();
            return Ok(flushed(exit, &mut words, &mut [&mut terminate, &mut interrupt]).await);
        }
        let deadline = floor.next_deadline();
        let grace = state.gone.map(|gone| gone + GRACE);
        tokio::select! {
            word = words.recv() => match word {
                Some(Word::Lane(post, event)) => {
                    let stands = post == Post::Compute && matches!(event, lane::Event::Ready);
                    floor.hear(post, event);
                    if stands && floor.settings.announce {
                        floor.ledger.announce(&Event::Ready {
                            version: env!("CARGO_PKG_VERSION"),
                            protocol: PROTOCOL,
                            pid: std::process::id(),
                        });
                    }
                }
                Some(Word::Writer(Note::Gone)) => {
                    state.gone.get_or_insert_with(Instant::now);
                    floor.shut_down(OnEof::Cancel);
                }
                Some(Word::Writer(Note::Flushed)) | None => {}
            },
            input = inputs.recv(), if state.input_open => {
                if !take(&mut floor, &instructor, input.unwrap_or(Input::End)) {
                    state.input_open = false;
                    if floor.settings.on_eof == OnEof::Cancel {
                        floor.cancel_all();
                    }
                }
            },
            () = sleep_until(deadline), if deadline.is_some() => floor.expire(),
            () = sleep_until(grace), if grace.is_some() => return Ok(Exit::StdoutGone),
            _ = heartbeat.tick(), if floor.settings.heartbeat_ms > 0 => {
                floor.ledger.announce(&Event::Heartbeat {
                    uptime_ms: floor.uptime_ms(),
                    queue_depth: queue_depth(&floor),
                    running: floor.ledger.in_flight() - queue_depth(&floor),
                });
            },
            _ = terminate.recv() => if let Some(exit) = state.signal(&mut floor, libc::SIGTERM) { return Ok(exit) },
            _ = interrupt.recv() => if let Some(exit) = state.signal(&mut floor, libc::SIGINT) { return Ok(exit) },
        }
    }
}

/// Where the loop stands between running and gone.
struct State {
    input_open: bool,
    signals: u32,
    /// Since when stdout has no reader.
    gone: Option<Instant>,
}

impl State {
    fn exit(&self, floor: &Floor) -> Option<Exit> {
        if !floor.is_idle() {
            return None;
        }
        match &floor.broken {
            _ if self.gone.is_some() => Some(Exit::StdoutGone),
            Some(Error::DeviceUnavailable { .. }) => Some(Exit::DeviceUnavailable),
            Some(_) => Some(Exit::Poisoned),
            None => (floor.ending || !self.input_open).then_some(Exit::Drained),
        }
    }

    /// Answers what was read already but not looked at.
    fn close(&self, floor: &mut Floor, instructor: &CommunicationInstructor, inputs: &mut mpsc::Receiver<Input>) {
        floor.draining = true;
        while let (true, Ok(input)) = (self.input_open, inputs.try_recv()) {
            take(floor, instructor, input);
        }
    }

    fn signal(&mut self, floor: &mut Floor, number: i32) -> Option<Exit> {
        self.signals += 1;
        match self.signals {
            1 => {
                floor.hand_back_queue();
                floor.ending = true;
            }
            2 => floor.shut_down(OnEof::Cancel),
            _ => return Some(Exit::Signal(number)),
        }
        None
    }
}

/// Waits for the last line to leave; a further signal, or nobody reading, ends the wait.
async fn flushed(
    exit: Exit,
    words: &mut mpsc::UnboundedReceiver<Word>,
    [terminate, interrupt]: &mut [&mut tokio::signal::unix::Signal; 2],
) -> Exit {
    loop {
        tokio::select! {
            word = words.recv() => match word {
                Some(Word::Writer(Note::Flushed)) | None => return exit,
                Some(Word::Writer(Note::Gone)) => return Exit::StdoutGone,
                Some(Word::Lane(..)) => {}
            },
            _ = terminate.recv() => return Exit::Signal(libc::SIGTERM),
            _ = interrupt.recv() => return Exit::Signal(libc::SIGINT),
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline.into()).await;
    }
}

/// Whether more input may follow.
fn take(floor: &mut Floor, instructor: &CommunicationInstructor, input: Input) -> bool {
    match input {
        Input::Line(line) => {
            if let Some(decoded) = floor.receive(&line) {
                control(floor, instructor, decoded);
            }
        }
        Input::TooLong => floor.receive_too_long(),
        Input::End => return false,
    }
    true
}

/// Answers a control operation at once.
fn control(floor: &mut Floor, instructor: &CommunicationInstructor, decoded: Decoded) {
    let Decoded { head, ask: Ask::Control(request), warnings, .. } = decoded else { return };
    let begun = Instant::now();
    let ctx = Context::new(head.request_id.clone(), CancelToken::default(), None, None, Box::new(|_| ()));
    let answer: Result<_> = dispatch::run(instructor, *request, floor, &ctx).and_then(|response| {
        to_raw_value(&response).map_err(|e| Error::bug(format!("a response has no JSON form: {e}")))
    });
    match answer {
        Ok(data) => {
            let timings = Timings { total: crate::communication::ledger::ms(begun.elapsed()), ..Timings::default() };
            let engine = Engine { version: env!("CARGO_PKG_VERSION"), device: None, dtype: None, quantization: None };
            floor.ledger.answer(&head.request_id, &Terminal::Result { data, warnings, timings, engine });
        }
        Err(error) => {
            floor.ledger.refuse(&head.request_id, &Fault { error: error.into(), pointer: None }, head.shorthand)
        }
    }
}
