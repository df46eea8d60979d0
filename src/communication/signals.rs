//! The signals that ask the process to end.

use std::io;

/// SIGTERM and SIGINT; on systems without them, Ctrl-C.
pub(crate) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    /// Starts to catch the signals.
    ///
    /// # Errors
    /// The system's, if it refuses a handler.
    #[cfg(unix)]
    pub(crate) fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    #[cfg(not(unix))]
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {})
    }

    /// Waits for the next signal and returns its number. Cancel safe.
    #[cfg(unix)]
    pub(crate) async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => libc::SIGTERM,
            _ = self.interrupt.recv() => libc::SIGINT,
        }
    }

    #[cfg(not(unix))]
    pub(crate) async fn next(&mut self) -> i32 {
        match tokio::signal::ctrl_c().await {
            Ok(()) => libc::SIGINT,
            Err(_) => std::future::pending().await,
        }
    }
}
