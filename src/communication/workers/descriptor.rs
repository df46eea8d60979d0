//! stdin and stdout as unbuffered files, and waiting on them.
#![cfg_attr(unix, expect(unsafe_code, reason = "only libc duplicates and polls descriptors"))]

use std::fs::File;
use std::io;
#[cfg(unix)]
use std::os::fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd};
#[cfg(windows)]
use std::os::windows::io::AsHandle as _;

/// Takes stdout for the protocol: a private duplicate of descriptor 1, which itself then points to stderr, so that no
/// print of any library reaches the wire.
///
/// # Errors
/// The system's, if it is out of descriptors.
#[cfg(unix)]
pub fn claim_stdout() -> io::Result<File> {
    // SAFETY: a system call on a descriptor number; a bad one is reported as an error.
    let private = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_DUPFD_CLOEXEC, 3) };
    if private < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it.
    let private = unsafe { OwnedFd::from_raw_fd(private) };
    // SAFETY: both descriptors are open: the standard library opens 0, 1 and 2 before `main` if they are closed.
    if unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(File::from(private))
}

/// Takes stdout for the protocol. Prints of libraries are not redirected on this system.
///
/// # Errors
/// The system's, if it is out of handles.
#[cfg(windows)]
pub fn claim_stdout() -> io::Result<File> {
    Ok(File::from(io::stdout().as_handle().try_clone_to_owned()?))
}

/// stdin as an unbuffered file.
///
/// # Errors
/// The system's, if it is out of descriptors.
pub fn stdin() -> io::Result<File> {
    #[cfg(unix)]
    let owned = io::stdin().as_fd().try_clone_to_owned()?;
    #[cfg(windows)]
    let owned = io::stdin().as_handle().try_clone_to_owned()?;
    Ok(File::from(owned))
}

/// Waits until a non-blocking file can be read.
///
/// # Errors
/// The system's.
pub(crate) fn wait_readable(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        poll(file, libc::POLLIN).map(drop)
    }
    #[cfg(windows)]
    {
        Err(unsupported(file))
    }
}

/// Waits until a non-blocking file can be written.
///
/// # Errors
/// The system's.
pub(crate) fn wait_writable(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        poll(file, libc::POLLOUT).map(drop)
    }
    #[cfg(windows)]
    {
        Err(unsupported(file))
    }
}

/// Waits until the reader of `file` has left, and returns true if it has. Where that cannot be watched, the next write
/// finds out.
///
/// # Errors
/// The system's.
pub(crate) fn wait_for_hangup(file: &File) -> io::Result<bool> {
    #[cfg(unix)]
    {
        // `poll` always reports errors and hang-ups, and no other event is requested.
        poll(file, 0).map(|events| events & (libc::POLLERR | libc::POLLHUP) != 0)
    }
    #[cfg(windows)]
    {
        Err(unsupported(file))
    }
}

#[cfg(windows)]
fn unsupported(_: &File) -> io::Error {
    io::ErrorKind::Unsupported.into()
}

/// Waits until one of `events` or an error holds on `file`, and returns those that do. Interruptions are ignored.
#[cfg(unix)]
fn poll(file: &File, events: libc::c_short) -> io::Result<libc::c_short> {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events, revents: 0 };
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
