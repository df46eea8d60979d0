//! One HTTP request to the hub, on a thread of its own: the caller can be cancelled while the connection is silent, and the
//! thread then ends with its next message or its timeout.

use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use hf_hub::Repo;
use hf_hub::api::sync::Api;

use crate::context::Context;
use crate::error::Error;

/// Timeout for connecting.
const CONNECT: Duration = Duration::from_secs(20);
/// Timeout for the head of the response.
const ANSWER: Duration = Duration::from_secs(60);
/// Timeout between two reads of the body.
const SILENCE: Duration = Duration::from_secs(30);
/// Interval at which a wait checks for cancellation.
const POLL: Duration = Duration::from_millis(50);
/// Bytes of one chunk of the body.
const CHUNK: usize = 128 << 10;
/// Chunks that the thread may read ahead.
const READ_AHEAD: usize = 4;

/// The failure of a request to the hub.
#[derive(Debug)]
pub(crate) enum HubError {
    /// Trying again would not help.
    Fatal(Error),
    /// The connection or the hub failed; another attempt may succeed.
    Transient(String),
}

impl From<Error> for HubError {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

/// A GET request.
pub(crate) struct HubRequest {
    pub(crate) url: String,
    /// The first byte to send, for the rest of a file.
    pub(crate) from: Option<u64>,
    /// Follow redirects. The token is sent only to the host of `url`.
    pub(crate) follow: bool,
}

/// Status and headers.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
}

impl ResponseHead {
    /// The value of a header; `name` is in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn is_redirect(&self) -> bool {
        (300..400).contains(&self.status)
    }
}

/// A message of the connection's thread.
enum ConnectionMessage {
    Head(ResponseHead),
    Chunk(Vec<u8>),
    End,
    Failed(String),
}

/// A response whose head has arrived.
pub(crate) struct HubResponse<'a> {
    pub(crate) head: ResponseHead,
    messages: Receiver<ConnectionMessage>,
    ctx: &'a Context,
}

/// Sends a request and waits for the head of the response.
pub(crate) fn send<'a>(
    api: &Api,
    repo: &Repo,
    request: HubRequest,
    ctx: &'a Context,
) -> Result<HubResponse<'a>, HubError> {
    ctx.checkpoint()?;
    let (sender, messages) = sync_channel(READ_AHEAD);
    let (api, repo) = (api.clone(), repo.clone());
    let spawned = std::thread::Builder::new()
        .name("hub-connection".to_owned())
        .spawn(move || transfer(&api, repo, &request, &sender));
    spawned.map_err(|error| HubError::Transient(format!("no thread for a connection: {error}")))?;
    match next(&messages, ctx)? {
        Some(ConnectionMessage::Head(head)) => Ok(HubResponse { head, messages, ctx }),
        Some(ConnectionMessage::Failed(message)) => Err(HubError::Transient(message)),
        Some(ConnectionMessage::Chunk(_) | ConnectionMessage::End) | None => Err(disconnected()),
    }
}

impl HubResponse<'_> {
    /// The next bytes of the body; `None` at its end.
    pub(crate) fn chunk(&mut self) -> Result<Option<Vec<u8>>, HubError> {
        match next(&self.messages, self.ctx)? {
            Some(ConnectionMessage::Chunk(bytes)) => Ok(Some(bytes)),
            Some(ConnectionMessage::Failed(message)) => Err(HubError::Transient(message)),
            Some(ConnectionMessage::End) => Ok(None),
            Some(ConnectionMessage::Head(_)) | None => Err(disconnected()),
        }
    }

    /// The whole body, at most `limit` bytes.
    pub(crate) fn body(mut self, limit: usize) -> Result<Vec<u8>, HubError> {
        let mut body = Vec::new();
        while let Some(bytes) = self.chunk()? {
            body.extend(bytes);
            if body.len() > limit {
                let message = format!("the hub sends more than {limit} bytes");
                return Err(Error::DownloadFailed { message }.into());
            }
        }
        Ok(body)
    }
}

fn disconnected() -> HubError {
    HubError::Transient("the connection ended before the response".to_owned())
}

/// Waits for the next message; `None` after the last one.
fn next(messages: &Receiver<ConnectionMessage>, ctx: &Context) -> Result<Option<ConnectionMessage>, HubError> {
    loop {
        ctx.checkpoint()?;
        match messages.recv_timeout(POLL) {
            Ok(message) => return Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

/// Sleeps, but wakes on cancellation.
pub(crate) fn sleep(time: Duration, ctx: &Context) -> Result<(), Error> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        ctx.checkpoint()?;
        std::thread::sleep(POLL.min(end.saturating_duration_since(Instant::now())));
    }
    ctx.checkpoint()
}

/// Runs on the connection's thread, and ends early if the receiver is gone.
fn transfer(api: &Api, repo: Repo, request: &HubRequest, sender: &SyncSender<ConnectionMessage>) {
    // hf-hub's request carries the token and the user agent, and drops the token on redirects to another host.
    let call = api.repo(repo).info_request().uri(request.url.as_str());
    let call = match request.from {
        Some(from) => call.header("Range", format!("bytes={from}-")),
        None => call,
    };
    // Lengths and ranges must count the bytes of the file, not of a compressed form.
    let call = call
        .header("Accept-Encoding", "identity")
        .config()
        .http_status_as_error(false)
        .max_redirects(if request.follow { 10 } else { 0 })
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(ANSWER))
        .timeout_per_read(Some(SILENCE))
        .build();
    let response = match call.call() {
        Ok(response) => response,
        Err(error) => return drop(sender.send(ConnectionMessage::Failed(error.to_string()))),
    };
    let (parts, body) = response.into_parts();
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let headers = parts.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value.as_bytes())));
    let head = ResponseHead { status: parts.status.as_u16(), headers: headers.collect() };
    if sender.send(ConnectionMessage::Head(head)).is_err() {
        return;
    }
    let mut body = body.into_reader();
    loop {
        let mut bytes = vec![0; CHUNK];
        let message = match body.read(&mut bytes) {
            Ok(0) => ConnectionMessage::End,
            Ok(count) => {
                bytes.truncate(count);
                ConnectionMessage::Chunk(bytes)
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => ConnectionMessage::Failed(error.to_string()),
        };
        let last = !matches!(message, ConnectionMessage::Chunk(_));
        if sender.send(message).is_err() || last {
            return;
        }
    }
}
