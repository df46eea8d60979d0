//! Identity of a checkpoint or component file, for caches.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::model::catalog::files::{ModelFile, ModelFolder};

/// Identifies a checkpoint and its state: the path, length and modification time of every file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CheckpointKey(pub(crate) u64);

impl CheckpointKey {
    /// The key of a cached item, from its distinguishing values.
    pub(crate) fn of(what: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Self(hasher.finish())
    }

    /// True if a resident reports this key.
    #[must_use]
    pub fn is(self, reported: Option<u64>) -> bool {
        reported == Some(self.0)
    }
}

/// The key of the files of a folder.
pub(crate) fn key(folder: &ModelFolder, files: &[ModelFile]) -> CheckpointKey {
    let mut hasher = DefaultHasher::new();
    folder.path("").hash(&mut hasher);
    for file in files {
        file.path().hash(&mut hasher);
        file.stamp().hash(&mut hasher);
    }
    CheckpointKey(hasher.finish())
}
