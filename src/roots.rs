//! The folders that requests may read and write files in, and the check that a path stays inside them.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// The configured folders. Requests reach nothing outside them, neither by `..` nor by an absolute path nor through a
/// symbolic link.
#[derive(Clone, Debug)]
pub struct Roots {
    folders: Vec<PathBuf>,
}

impl Roots {
    /// Relative folders are relative to the working directory; a folder need not exist yet.
    #[must_use]
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { folders: folders.into_iter().collect() }
    }

    /// Resolves every symbolic link of `path`, and checks that the result is inside a root. The end of the path need not
    /// exist. `field` is the request field of the path, for errors.
    ///
    /// # Errors
    /// `path_not_allowed` outside the roots and for `..`, whether or not the path exists; `invalid_parameter` for a path
    /// that no file system accepts.
    pub fn resolve(&self, path: &Path, field: &str) -> Result<PathBuf> {
        let refused = || Error::PathNotAllowed { path: path.to_owned() };
        if path.as_os_str().is_empty() {
            return Err(Error::invalid(field, "must name a file, got an empty path"));
        }
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(refused());
        }
        let real = match resolve_links(path) {
            Ok(real) => real,
            Err(error) if error.kind() == ErrorKind::InvalidFilename || error.kind() == ErrorKind::InvalidInput => {
                return Err(Error::invalid(field, format!("names no usable path: {error}")));
            }
            Err(_) => return Err(refused()),
        };
        let inside = self.folders.iter().filter_map(|root| resolve_links(root).ok()).any(|root| real.starts_with(root));
        if inside { Ok(real) } else { Err(refused()) }
    }

    /// Creates `folder` with its parents, and returns it with every symbolic link resolved.
    ///
    /// # Errors
    /// Those of [`Self::resolve`], and `output_write_failed`.
    pub fn make_folder(&self, folder: &Path, field: &str) -> Result<PathBuf> {
        let real = self.resolve(folder, field)?;
        std::fs::create_dir_all(&real)
            .map_err(|error| Error::OutputWriteFailed { path: folder.to_owned(), message: error.to_string() })?;
        // Between the check and the creation a part may have become a link.
        self.resolve(folder, field)
    }
}

/// The absolute path, with the links of its existing part resolved.
fn resolve_links(path: &Path) -> std::io::Result<PathBuf> {
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
        Err(error) if error.kind() == ErrorKind::NotFound => dangling_target(&existing)?,
        real => real?,
    };
    real.extend(rest.iter().rev());
    Ok(real)
}

/// The target of a link to a file that does not exist; it must be inside a root like any other path.
fn dangling_target(link: &Path) -> std::io::Result<PathBuf> {
    let not_found = || std::io::Error::from(ErrorKind::NotFound);
    let mut real = link.parent().ok_or_else(not_found)?.canonicalize()?;
    for part in std::fs::read_link(link)?.components() {
        match part {
            Component::ParentDir => drop(real.pop()),
            Component::CurDir => {}
            // Chains of links are refused, because they could lead elsewhere.
            _ => {
                real.push(part);
                if real.is_symlink() {
                    return Err(not_found());
                }
            }
        }
    }
    Ok(real)
}
