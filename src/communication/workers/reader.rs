//! Splits stdin into lines, on a thread that never stops reading.

use std::io::{self, ErrorKind, Read};

use crate::communication::workers::descriptor;

/// An item of stdin.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A line that is not blank, without its line ending.
    Line(Vec<u8>),
    /// A line beyond the limit, whose bytes were discarded.
    TooLong,
    End,
}

/// Splits bytes into lines and keeps at most `limit` bytes of each.
pub struct Splitter {
    limit: usize,
    line: Vec<u8>,
    overflow: bool,
    first: bool,
}

const BOM: &[u8] = b"\xef\xbb\xbf";

impl Splitter {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, line: Vec::new(), overflow: false, first: true }
    }

    /// Takes the next bytes and gives the lines that end in them.
    pub fn feed(&mut self, mut bytes: &[u8], give: &mut impl FnMut(Input)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (head, tail) = bytes.split_at(end);
            self.keep(head);
            self.finish(give);
            bytes = tail.get(1..).unwrap_or_default();
        }
        self.keep(bytes);
    }

    /// Ends the current line, with or without a newline.
    pub fn finish(&mut self, give: &mut impl FnMut(Input)) {
        let mut line = std::mem::take(&mut self.line);
        let overflow = std::mem::take(&mut self.overflow);
        if std::mem::take(&mut self.first) && line.starts_with(BOM) {
            line.drain(..BOM.len());
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        if overflow || line.len() > self.limit {
            give(Input::TooLong);
        } else if !line.iter().all(u8::is_ascii_whitespace) {
            give(Input::Line(line));
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        // A carriage return does not count against the limit, nor does the byte order mark.
        let slack = if self.first { 1 + BOM.len() } else { 1 };
        if self.overflow || self.line.len() + bytes.len() > self.limit.saturating_add(slack) {
            self.overflow = true;
            self.line = Vec::new();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }
}

/// Reads stdin to its end on a new thread. `give` may block; it returns false if no one receives any more.
///
/// # Errors
/// The system's, if it is out of threads or descriptors.
pub fn spawn(limit: usize, mut give: impl FnMut(Input) -> bool + Send + 'static) -> io::Result<()> {
    let mut stdin = descriptor::stdin()?;
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let mut splitter = Splitter::new(limit);
        let mut bytes = vec![0; 64 << 10];
        let mut received = true;
        loop {
            let count = match stdin.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                // An inherited descriptor may be non-blocking.
                Err(e) if e.kind() == ErrorKind::WouldBlock && descriptor::wait_readable(&stdin).is_ok() => continue,
                Err(error) => {
                    tracing::error!(%error, "stdin cannot be read and is taken as ended");
                    break;
                }
            };
            splitter.feed(bytes.get(..count).unwrap_or_default(), &mut |input| received &= give(input));
            if !received {
                return;
            }
        }
        splitter.finish(&mut |input| received &= give(input));
        give(Input::End);
    })?;
    Ok(())
}
