//! Open sets by name: samplers, spacings, output formats, model families. One line an entry.

use crate::error::{Error, Result, nearest};

/// A static table from a name to the thing it names.
pub struct Registry<T: ?Sized + 'static> {
    kind: &'static str,
    entries: &'static [(&'static str, &'static T)],
}

impl<T: ?Sized + 'static> Registry<T> {
    #[must_use]
    pub const fn new(kind: &'static str, entries: &'static [(&'static str, &'static T)]) -> Self {
        Self { kind, entries }
    }

    /// # Errors
    /// `unknown_name` with the nearest name.
    pub fn get(&self, name: &str) -> Result<&'static T> {
        self.entries.iter().find(|(known, _)| *known == name).map(|(_, entry)| *entry).ok_or_else(|| {
            Error::UnknownName {
                kind: self.kind,
                name: name.to_owned(),
                nearest: nearest(name, self.names()),
                field: None,
            }
        })
    }

    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<T> {
        self.entries.iter().map(|(name, _)| *name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &'static T)> + use<T> {
        self.entries.iter().map(|(name, entry)| (*name, *entry))
    }
}
