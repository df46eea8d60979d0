//! The folders beneath which requests may name files, and the check that a path stays beneath them.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// Folders that were configured by whoever runs the worker. Requests reach nothing outside of them: neither by `..`,
/// nor by an absolute path, nor through a symbolic link.
#[derive(Clone, Debug)]
pub struct Roots {
    folders: Vec<PathBuf>,
}

impl Roots {
    /// Relative folders are taken from the working directory; a folder need not exist yet.
    #[must_use]
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { folders: folders.into_iter().collect() }
    }

    /// `path` with every symbolic link resolved, if that lies beneath a root. The path's end need not exist.
    /// `field` is the part of the request in which the path stood.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, whether or not the path exists; `invalid_parameter` for
    /// what no file system takes.
    pub fn beneath(&self, path: &Path, field: &str) -> Result<PathBuf> {
        let refused = || Error::PathNotAllowed { path: path.to_owned() };
        if path.as_os_str().is_empty() {
            return Err(Error::invalid(field, "must name a file, got an empty path"));
        }
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(refused());
        }
        let real = match settle(path) {
            Ok(real) => real,
            Err(error) if error.kind() == ErrorKind::InvalidFilename || error.kind() == ErrorKind::InvalidInput => {
                return Err(Error::invalid(field, format!("names no usable path: {error}")));
            }
            Err(_) => return Err(refused()),
        };
        let inside = self.folders.iter().filter_map(|root| settle(root).ok()).any(|root| real.starts_with(root));
        if inside { Ok(real) } else { Err(refused()) }
    }

    /// Makes `folder` with its parents, and gives it with every symbolic link resolved.
    ///
    /// # Errors
    /// Those of [`Self::beneath`], and `output_write_failed`.
    pub fn make_folder(&self, folder: &Path, field: &str) -> Result<PathBuf> {
        let real = self.beneath(folder, field)?;
        std::fs::create_dir_all(&real)
            .map_err(|error| Error::OutputWriteFailed { path: folder.to_owned(), message: error.to_string() })?;
        // Between the check and the creation a part may have become a link.
        self.beneath(folder, field)
    }
}

/// The absolute path with the links of its existing part resolved, and the rest appended.
fn settle(path: &Path) -> std::io::Result<PathBuf> {
    let mut existing = std::path::absolute(path)?;
    let mut rest: Vec<OsString> = Vec::new();
    loop {
        match existing.symlink_metadata() {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match existing.file_name() {
                    Some(name) => rest.push(name.to_owned()),
                    None => return Err(error),
                }
                existing.pop();
            }
            Err(error) => return Err(error),
        }
    }
    let mut real = match existing.canonicalize() {
        Err(error) if error.kind() == ErrorKind::NotFound => dangling(&existing)?,
        real => real?,
    };
    real.extend(rest.iter().rev());
    Ok(real)
}

/// Where a link leads that leads to nothing: as far as it goes, it must stay beneath a root like any other.
fn dangling(link: &Path) -> std::io::Result<PathBuf> {
    let lost = || std::io::Error::from(ErrorKind::NotFound);
    let mut real = link.parent().ok_or_else(lost)?.canonicalize()?;
    for part in std::fs::read_link(link)?.components() {
        match part {
            Component::ParentDir => drop(real.pop()),
            Component::CurDir => {}
            // A further link on the way would lead somewhere else.
            _ => {
                real.push(part);
                if real.is_symlink() {
                    return Err(lost());
                }
            }
        }
    }
    Ok(real)
}
