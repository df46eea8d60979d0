//! A minimal local hub server: repositories, commits, and the faults that a test injects.
#![expect(clippy::unwrap_used, reason = "what cannot be set up fails the test that wanted it")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

/// Injected faults.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// Requests whose path contains the text get this status.
    pub(crate) status: Option<(String, u16)>,
    /// The connection closes after so many bytes, so many times.
    pub(crate) cut: Option<(usize, usize)>,
    /// The pause between the pieces of a stored file.
    pub(crate) slow: Option<Duration>,
    /// Answers of stored files stall after their beginning.
    pub(crate) silent: bool,
    /// Replaces the right `ETag`.
    pub(crate) etag: Option<String>,
    /// Replaces the right commit of a file.
    pub(crate) commit: Option<String>,
    /// The last byte of every file is wrong.
    pub(crate) altered: bool,
    /// Range requests get the whole file.
    pub(crate) whole: bool,
    /// Files are served by the hub itself, without a redirect.
    pub(crate) direct: bool,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) host: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

/// Name and bytes.
type File = (String, Arc<Vec<u8>>);

#[derive(Default)]
struct State {
    /// Repository and revision to commit.
    revisions: HashMap<(String, String), String>,
    /// Commit to files.
    commits: HashMap<String, Vec<File>>,
    faults: Faults,
    seen: Vec<Seen>,
}

pub(crate) struct Hub {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Hub {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = Arc::clone(&shared);
                // The worker may have closed the connection.
                std::thread::spawn(move || drop(answer(stream, port, &state)));
            }
        });
        Self { port, state }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Adds a commit, and moves `revisions` of the repository to it.
    pub(crate) fn commit(&self, repository: &str, revisions: &[&str], commit: &str, files: Vec<(String, Vec<u8>)>) {
        let mut state = self.state.lock().unwrap();
        for revision in revisions.iter().chain([&commit]) {
            state.revisions.insert((repository.to_owned(), (*revision).to_owned()), commit.to_owned());
        }
        let files = files.into_iter().map(|(name, bytes)| (name, Arc::new(bytes))).collect();
        state.commits.insert(commit.to_owned(), files);
    }

    pub(crate) fn fail(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// The requests since the last call.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answer(mut stream: TcpStream, port: u16, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().replace("%20", " ");
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let get = |name: &str| headers.get(name).cloned();
    let seen = Seen { host: get("host").unwrap_or_default(), range: get("range"), authorization: get("authorization") };
    let mut held = state.lock().unwrap();
    held.seen.push(seen);
    let faults = held.faults.clone();
    if let Some((_, status)) = faults.status.as_ref().filter(|(part, _)| path.contains(part)) {
        return write!(stream, "HTTP/1.1 {status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let nothing = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let rest = rest.split('?').next().unwrap_or_default();
        let (repository, revision) = rest.split_once("/revision/").unwrap_or_default();
        let key = (repository.to_owned(), revision.replace("%2F", "/"));
        let Some(commit) = held.revisions.get(&key) else { return stream.write_all(nothing.as_bytes()) };
        let files = held.commits.get(commit).unwrap();
        let siblings: Vec<_> =
            files.iter().map(|(name, bytes)| json!({ "rfilename": name, "size": bytes.len() })).collect();
        let body = json!({ "id": repository, "sha": commit, "siblings": siblings }).to_string();
        let length = body.len();
        return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    }
    let file = path.split_once("/resolve/").and_then(|(repository, rest)| {
        let (commit, name) = rest.split_once('/')?;
        let key = (repository.trim_start_matches('/').trim_start_matches("store/").to_owned(), commit.to_owned());
        held.revisions.get(&key)?;
        let (_, bytes) = held.commits.get(commit)?.iter().find(|(known, _)| *known == name)?;
        Some((commit.to_owned(), name.to_owned(), Arc::clone(bytes)))
    });
    let Some((commit, name, bytes)) = file else { return stream.write_all(nothing.as_bytes()) };
    let hash = sha256(&bytes);
    let stored = path.starts_with("/store/");
    let large = name.ends_with(".safetensors");
    let etag = if large { hash.clone() } else { hash.get(..40).unwrap().to_owned() };
    let etag = faults.etag.clone().unwrap_or(etag);
    let commit = faults.commit.clone().unwrap_or(commit);
    if large && !stored && !faults.direct {
        let to = format!("http://localhost:{port}/store{}", path.replace(' ', "%20"));
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nLocation: {to}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\n\
             ETag: \"of-the-redirection\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let from: Option<usize> = get("range")
        .filter(|_| !faults.whole)
        .and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
    let whole = bytes.len();
    let mut body = bytes.get(from.unwrap_or(0)..).unwrap_or_default().to_vec();
    if let Some(last) = body.last_mut().filter(|_| faults.altered) {
        *last ^= 1;
    }
    let cut = match &mut held.faults.cut {
        Some((after, times)) if *times > 0 && large && body.len() > *after => {
            *times -= 1;
            Some(*after)
        }
        _ => None,
    };
    drop(held);
    let status = match from {
        Some(from) => format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{whole}", whole.max(1) - 1),
        None => "200 OK".to_owned(),
    };
    if from.is_some_and(|from| from >= whole) {
        let range = format!("Content-Range: bytes */{whole}");
        return write!(stream, "HTTP/1.1 416 Beyond\r\n{range}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    )?;
    body.truncate(cut.unwrap_or(usize::MAX));
    if faults.silent && large {
        stream.write_all(body.get(..100).unwrap_or_default())?;
        // Until the client disconnects.
        return reader.read_to_end(&mut Vec::new()).map(drop);
    }
    match faults.slow.filter(|_| large) {
        None => stream.write_all(&body),
        Some(pause) => body.chunks(500_000).try_for_each(|piece| {
            std::thread::sleep(pause);
            stream.write_all(piece)
        }),
    }
}
