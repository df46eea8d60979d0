//! One request to the hub. It runs on a thread of its own, because a connection may be silent for longer than whoever
//! waits for it wants to wait: they leave, and the thread ends with its next word or its timeout.

use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use hf_hub::Repo;
use hf_hub::api::sync::Api;

use crate::context::Context;
use crate::error::Error;

/// How long a connection may take to stand.
const CONNECT: Duration = Duration::from_secs(20);
/// How long the hub may take to begin its answer.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether the request still wants the answer.
const GLANCE: Duration = Duration::from_millis(50);
/// Bytes that are handed over at once.
const CHUNK: usize = 128 << 10;
/// Chunks that may lie between the two threads.
const AHEAD: usize = 4;

/// Why a request to the hub gave nothing.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// There is no use in asking again.
    End(Error),
    /// The connection or the hub failed; it may work the next time.
    Again(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::End(error)
    }
}

/// What is asked for.
pub(crate) struct Ask {
    pub(crate) url: String,
    /// The first byte that is wanted, for a part of a file.
    pub(crate) from: Option<u64>,
    /// Whether redirections are followed. The token goes to the host of `url` alone.
    pub(crate) follow: bool,
}

/// Status and headers.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    /// The value of a header; `name` is in lower case.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn is_redirection(&self) -> bool {
        (300..400).contains(&self.status)
    }
}

enum Word {
    Head(Head),
    Chunk(Vec<u8>),
    End,
    Failed(String),
}

/// An answer that has begun.
pub(crate) struct Answer<'a> {
    pub(crate) head: Head,
    words: Receiver<Word>,
    ctx: &'a Context,
}

/// Asks, and waits for the head of the answer.
pub(crate) fn ask<'a>(api: &Api, repo: &Repo, ask: Ask, ctx: &'a Context) -> Result<Answer<'a>, Trouble> {
    ctx.checkpoint()?;
    let (say, words) = sync_channel(AHEAD);
    let (api, repo) = (api.clone(), repo.clone());
    let spawned = std::thread::Builder::new().name("hub-wire".to_owned()).spawn(move || carry(&api, repo, &ask, &say));
    spawned.map_err(|error| Trouble::Again(format!("no thread for a connection: {error}")))?;
    match next(&words, ctx)? {
        Some(Word::Head(head)) => Ok(Answer { head, words, ctx }),
        Some(Word::Failed(message)) => Err(Trouble::Again(message)),
        Some(Word::Chunk(_) | Word::End) | None => Err(unanswered()),
    }
}

impl Answer<'_> {
    /// The next bytes of the body; `None` at its end.
    pub(crate) fn chunk(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        match next(&self.words, self.ctx)? {
            Some(Word::Chunk(bytes)) => Ok(Some(bytes)),
            Some(Word::Failed(message)) => Err(Trouble::Again(message)),
            Some(Word::End) => Ok(None),
            Some(Word::Head(_)) | None => Err(unanswered()),
        }
    }

    /// The whole body, at most `limit` bytes.
    pub(crate) fn body(mut self, limit: usize) -> Result<Vec<u8>, Trouble> {
        let mut body = Vec::new();
        while let Some(bytes) = self.chunk()? {
            body.extend(bytes);
            if body.len() > limit {
                let message = format!("the hub answers with more than {limit} bytes");
                return Err(Error::DownloadFailed { message }.into());
            }
        }
        Ok(body)
    }
}

fn unanswered() -> Trouble {
    Trouble::Again("the connection ended before the answer".to_owned())
}

/// Waits for a word; none where there will be no more.
fn next(words: &Receiver<Word>, ctx: &Context) -> Result<Option<Word>, Trouble> {
    loop {
        ctx.checkpoint()?;
        match words.recv_timeout(GLANCE) {
            Ok(word) => return Ok(Some(word)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

/// Waits without being deaf.
pub(crate) fn pause(time: Duration, ctx: &Context) -> Result<(), Error> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        ctx.checkpoint()?;
        std::thread::sleep(GLANCE.min(end.saturating_duration_since(Instant::now())));
    }
    ctx.checkpoint()
}

/// The thread's own side. A word that nobody hears ends it.
fn carry(api: &Api, repo: Repo, ask: &Ask, say: &SyncSender<Word>) {
    // hf-hub's request brings the token and the name of the program, and its redirections keep the token at home.
    let request = api.repo(repo).info_request().uri(ask.url.as_str());
    let request = match ask.from {
        Some(from) => request.header("Range", format!("bytes={from}-")),
        None => request,
    };
    // Lengths and ranges are those of the file, and not of a compressed form of it.
    let request = request.header("Accept-Encoding", "identity").config();
    let request = request
        .http_status_as_error(false)
        .max_redirects(if ask.follow { 10 } else { 0 })
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(ANSWER))
        .timeout_per_read(Some(SILENCE))
        .build();
    let answer = match request.call() {
        Ok(answer) => answer,
        Err(error) => return drop(say.send(Word::Failed(error.to_string()))),
    };
    let (parts, body) = answer.into_parts();
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let headers = parts.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value.as_bytes())));
    let head = Head { status: parts.status.as_u16(), headers: headers.collect() };
    if say.send(Word::Head(head)).is_err() {
        return;
    }
    let mut body = body.into_reader();
    loop {
        let mut bytes = vec![0; CHUNK];
        let word = match body.read(&mut bytes) {
            Ok(0) => Word::End,
            Ok(count) => {
                bytes.truncate(count);
                Word::Chunk(bytes)
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => Word::Failed(error.to_string()),
        };
        let last = !matches!(word, Word::Chunk(_));
        if say.send(word).is_err() || last {
            return;
        }
    }
}
