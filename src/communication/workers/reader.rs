//! Bytes of stdin to lines. Runs on a thread of its own and never stops reading.

use std::io::{self, ErrorKind, Read};

use crate::communication::workers::descriptor;

/// What stdin gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// Without its line ending, not blank.
    Line(Vec<u8>),
    /// A line beyond the limit; its bytes are gone.
    TooLong,
    End,
}

/// Splits bytes into lines, of which no more than `limit` bytes are ever kept.
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

    /// Takes the next bytes and gives the lines that they end.
    pub fn feed(&mut self, mut bytes: &[u8], give: &mut impl FnMut(Input)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (head, tail) = bytes.split_at(end);
            self.keep(head);
            self.finish(give);
            bytes = tail.get(1..).unwrap_or_default();
        }
        self.keep(bytes);
    }

    /// The input has ended; what stands without a newline is a line too.
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
        // Two bytes over the limit: a carriage return does not count, nor does the mark at the start of the input.
        let slack = if self.first { 1 + BOM.len() } else { 1 };
        if self.overflow || self.line.len() + bytes.len() > self.limit.saturating_add(slack) {
            self.overflow = true;
            self.line = Vec::new();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }
}

/// Reads stdin to its end on a new thread. `give` may block, and answers whether anybody still listens.
///
/// # Errors
/// The system's, when it has no thread or descriptor to give.
pub fn spawn(limit: usize, mut give: impl FnMut(Input) -> bool + Send + 'static) -> io::Result<()> {
    let mut stdin = descriptor::stdin()?;
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let mut splitter = Splitter::new(limit);
        let mut bytes = vec![0; 64 << 10];
        let mut listened = true;
        loop {
            let count = match stdin.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                // An inherited descriptor may be set not to block.
                Err(e) if e.kind() == ErrorKind::WouldBlock && descriptor::wait(&stdin, libc::POLLIN).is_ok() => {
                    continue;
                }
                Err(error) => {
                    tracing::error!(%error, "stdin cannot be read; taken as its end");
                    break;
                }
            };
            splitter.feed(bytes.get(..count).unwrap_or_default(), &mut |input| listened &= give(input));
            if !listened {
                return;
            }
        }
        splitter.finish(&mut |input| listened &= give(input));
        give(Input::End);
    })?;
    Ok(())
}
