//! The files of one model: in a folder on disk under the configured roots, or embedded in the binary.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::catalog::demo;
use crate::roots::Roots;

/// Resolves `path` and its links; `None` if nothing is there.
///
/// # Errors
/// `path_not_allowed` outside the roots.
pub(crate) fn admit(roots: &Roots, path: &Path) -> Result<Option<PathBuf>> {
    let real = roots.resolve(path, "model")?;
    Ok(real.exists().then_some(real))
}

/// The folder of one model; files are named by their path in the diffusers layout.
#[derive(Clone, Debug)]
pub(crate) enum ModelFolder {
    Disk { path: PathBuf, roots: Roots },
    Embedded,
}

/// A file that exists and may be read.
#[derive(Clone, Debug)]
pub(crate) enum ModelFile {
    Disk(PathBuf),
    Embedded { path: PathBuf, bytes: &'static [u8] },
}

impl ModelFile {
    /// Its path, for messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Disk(path) | Self::Embedded { path, .. } => path,
        }
    }

    /// Opens a file on disk for reading. Only regular files are opened, because opening a pipe waits for its writer.
    pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
        let corrupt = |message: String| Error::ModelCorrupt { path: path.to_owned(), message };
        let unreadable = |e: std::io::Error| corrupt(format!("cannot be read: {e}"));
        let kind = |meta: &fs::Metadata| if meta.is_dir() { "a directory" } else { "not a regular file" };
        let wanted = |meta: &fs::Metadata| match meta.is_file() {
            true => Ok(()),
            false => Err(corrupt(format!("must be a file, and is {}", kind(meta)))),
        };
        wanted(&fs::metadata(path).map_err(unreadable)?)?;
        let mut options = fs::OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
        let file = options.open(path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        wanted(&meta)?;
        Ok((file, meta.len()))
    }

    /// The whole file, at most `limit` bytes.
    pub(crate) fn read(&self, limit: u64) -> Result<Vec<u8>> {
        match self {
            Self::Embedded { bytes, .. } => Ok(bytes.to_vec()),
            Self::Disk(path) => {
                let corrupt = |message: String| Error::ModelCorrupt { path: path.clone(), message };
                let (file, length) = Self::open(path)?;
                if length > limit {
                    return Err(corrupt(format!("must be at most {limit} bytes, and is {length}")));
                }
                let mut bytes = Vec::new();
                file.take(limit).read_to_end(&mut bytes).map_err(|e| corrupt(format!("cannot be read: {e}")))?;
                Ok(bytes)
            }
        }
    }

    /// Parses a JSON object. Lists are refused, because serde would read a struct from one.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self, limit: u64) -> Result<T> {
        let corrupt = |message: String| Error::ModelCorrupt { path: self.path().to_owned(), message };
        let bytes = self.read(limit)?;
        let text = std::str::from_utf8(&bytes).map_err(|e| corrupt(format!("cannot be parsed: {e}")))?;
        if text.trim_start().starts_with('[') {
            return Err(corrupt("must be a JSON object, and is a list".to_owned()));
        }
        serde_json::from_str(text).map_err(|e| corrupt(format!("cannot be parsed: {e}")))
    }

    /// Length and modification time, which are part of the key of its model.
    pub(crate) fn stamp(&self) -> (u64, Option<std::time::SystemTime>) {
        match self {
            Self::Embedded { bytes, .. } => (bytes.len() as u64, None),
            Self::Disk(path) => match fs::metadata(path) {
                Ok(meta) => (meta.len(), meta.modified().ok()),
                Err(_) => (0, None),
            },
        }
    }
}

impl ModelFolder {
    /// The path of the folder, or of the file `name` in it, for messages.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Disk { path, .. } if name.is_empty() => path.clone(),
            Self::Disk { path, .. } => path.join(name),
            Self::Embedded => Path::new(demo::NAME).join(name),
        }
    }

    /// The file `name`, if it exists.
    ///
    /// # Errors
    /// `path_not_allowed` if it is a link that leads out of the roots.
    pub(crate) fn find(&self, name: &str) -> Result<Option<ModelFile>> {
        match self {
            Self::Disk { path, roots } => {
                let path = path.join(name);
                // The unresolved path is kept for messages; its target has been admitted.
                Ok(admit(roots, &path)?.map(|_| ModelFile::Disk(path)))
            }
            Self::Embedded => Ok(demo::file(name).map(|bytes| ModelFile::Embedded { path: self.path(name), bytes })),
        }
    }

    /// The file `name`.
    ///
    /// # Errors
    /// `model_corrupt` if it is missing, otherwise as [`Self::find`].
    pub(crate) fn need(&self, name: &str) -> Result<ModelFile> {
        self.find(name)?.ok_or_else(|| Error::ModelCorrupt { path: self.path(name), message: "is missing".to_owned() })
    }

    /// The sorted names in the subfolder `name`; empty if there is none.
    pub(crate) fn names(&self, name: &str) -> Vec<String> {
        let mut names: Vec<String> = match self {
            Self::Disk { path, .. } => fs::read_dir(path.join(name))
                .into_iter()
                .flatten()
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
            Self::Embedded => demo::FILES
                .iter()
                .filter_map(|(path, _)| path.strip_prefix(name)?.strip_prefix('/'))
                .map(str::to_owned)
                .collect(),
        };
        names.sort();
        names
    }
}
