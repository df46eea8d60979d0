//! Identity of a checkpoint or component file, for caches.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::model::catalog::files::{ModelFile, ModelFolder};

/// What tells one state of one checkpoint from every other: where it lies, and the length and time of every file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CheckpointKey(pub(crate) u64);

impl CheckpointKey {
    /// Of what tells one thing that is kept from every other.
    pub(crate) fn of(what: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Self(hasher.finish())
    }

    /// Whether it is what a resident says of itself.
    #[must_use]
    pub fn is(self, told: Option<u64>) -> bool {
        told == Some(self.0)
    }
}

pub(crate) fn key(folder: &ModelFolder, files: &[ModelFile]) -> CheckpointKey {
    let mut hasher = DefaultHasher::new();
    folder.path("").hash(&mut hasher);
    for found in files {
        found.path().hash(&mut hasher);
        found.stamp().hash(&mut hasher);
    }
    CheckpointKey(hasher.finish())
}
