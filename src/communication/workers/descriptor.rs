//! File descriptors 0 and 1, which the standard library does not lend in the form the wire needs.
#![expect(unsafe_code, reason = "duplicating and polling descriptors is libc's alone")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Takes stdout for the protocol: a private duplicate of descriptor 1, which itself now leads to stderr, so that no
/// stray print of any library reaches the wire.
///
/// # Errors
/// The system's, when descriptors have run out.
pub fn claim_stdout() -> io::Result<File> {
    // SAFETY: plain system calls on descriptor numbers; a bad one is reported as an error.
    let private = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_DUPFD_CLOEXEC, 3) };
    if private < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, so nothing else owns it.
    let private = unsafe { OwnedFd::from_raw_fd(private) };
    // SAFETY: both descriptors are open: the standard library opens 0, 1 and 2 before `main` where they are closed.
    if unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(File::from(private))
}

/// Descriptor 0 as a file without a buffer.
///
/// # Errors
/// The system's, when descriptors have run out.
pub fn stdin() -> io::Result<File> {
    use std::os::fd::AsFd;
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// Waits until one of `events` or an error holds on `file`, and says which.
///
/// # Errors
/// The system's, except interruption, after which it waits on.
pub fn wait(file: &impl AsRawFd, events: libc::c_short) -> io::Result<libc::c_short> {
    wait_on(file.as_raw_fd(), events)
}

fn wait_on(fd: RawFd, events: libc::c_short) -> io::Result<libc::c_short> {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    loop {
        // SAFETY: `poll` is one valid entry for the length of the call.
        if unsafe { libc::poll(&raw mut poll, 1, -1) } >= 0 {
            return Ok(poll.revents);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
