//! Writes a file atomically, and never overwrites another.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;

/// One file to write.
#[derive(Clone, Copy)]
pub(crate) struct WriteTask<'a> {
    /// An existing folder.
    pub(crate) folder: &'a Path,
    /// The file's name without its extension.
    pub(crate) stem: &'a str,
    pub(crate) extension: &'static str,
    /// If the file exists, try `stem-1`, `stem-2` … instead of failing.
    pub(crate) count_up: bool,
    pub(crate) bytes: &'a [u8],
}

/// Returns the path of the file.
pub(crate) struct WriteFile;

impl<'a> Worker<WriteTask<'a>> for WriteFile {
    type Output = PathBuf;

    fn run(&self, task: WriteTask<'a>, _ctx: &Context) -> Result<PathBuf> {
        let path_of = |attempt: u64| match attempt {
            0 => task.folder.join(format!("{}.{}", task.stem, task.extension)),
            n => task.folder.join(format!("{}-{n}.{}", task.stem, task.extension)),
        };
        let failed = |error: &std::io::Error| Error::OutputWriteFailed { path: path_of(0), message: error.to_string() };
        let mut file = temporary(task.folder).map_err(|error| failed(&error))?;
        file.write_all(task.bytes).and_then(|()| file.as_file().sync_all()).map_err(|error| failed(&error))?;
        let mut attempt = 0;
        loop {
            let path = path_of(attempt);
            match file.persist_noclobber(&path) {
                Ok(_) => return Ok(path),
                Err(taken) if taken.error.kind() == ErrorKind::AlreadyExists => {
                    if !task.count_up {
                        return Err(Error::OutputExists { path });
                    }
                    file = taken.file;
                }
                Err(other) => return Err(failed(&other.error)),
            }
            attempt += 1;
        }
    }
}

/// A temporary file in the same folder, so that the rename stays in one file system; removed when dropped.
fn temporary(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".sdxl-worker-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The process's umask narrows this, as it does for any new file.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}
