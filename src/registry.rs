//! Open sets by name, such as samplers, upscalers and output formats: one line an entry.

use crate::error::{Error, Result, nearest};

/// A static table of named entries.
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
        let entry = self.entries.iter().find(|(known, _)| *known == name);
        entry.map(|(_, entry)| *entry).ok_or_else(|| self.unknown(name))
    }

    /// The error for a name that is not in the table.
    #[must_use]
    pub fn unknown(&self, name: &str) -> Error {
        let nearest = nearest(name, self.names());
        Error::UnknownName { kind: self.kind, name: name.to_owned(), nearest, field: None }
    }

    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<T> {
        self.entries.iter().map(|(name, _)| *name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &'static T)> + use<T> {
        self.entries.iter().map(|(name, entry)| (*name, *entry))
    }
}
