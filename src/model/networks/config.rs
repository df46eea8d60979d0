//! Values of networks' configurations: by block, and within the limits of what this worker computes.

use std::ops::RangeInclusive;

use serde::Deserialize;

use crate::error::{Error, Result};

/// A value for all blocks, or one for each.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum PerBlock<T> {
    // First, so that a list is never taken for one value that happens to be a list itself.
    Each(Vec<T>),
    Same(T),
}

impl<T> PerBlock<T> {
    /// The value of block `index`; `None` where a list is too short.
    #[must_use]
    pub fn at(&self, index: usize) -> Option<&T> {
        match self {
            Self::Each(values) => values.get(index),
            Self::Same(value) => Some(value),
        }
    }

    /// Every value that is written.
    #[must_use]
    pub fn values(&self) -> &[T] {
        match self {
            Self::Each(values) => values,
            Self::Same(value) => std::slice::from_ref(value),
        }
    }

    /// True if there is a value for each of `blocks`, and none beyond.
    #[must_use]
    pub fn fits(&self, blocks: usize) -> bool {
        match self {
            Self::Each(values) => values.len() == blocks,
            Self::Same(_) => true,
        }
    }
}

/// The most channels that a layer may have.
pub(crate) const MAX_CHANNELS: usize = 1 << 15;
/// The most resolutions of a UNet or VAE, and the most layers at one of them.
pub(crate) const MAX_BLOCKS: usize = 8;
pub(crate) const MAX_LAYERS: usize = 64;

/// Validators the values of a configuration. `name` is the network as its user knows it.
#[derive(Clone, Copy)]
pub(crate) struct Validator<'a> {
    pub(crate) name: &'a str,
}

impl Validator<'_> {
    pub(crate) fn refuse(self, message: impl Into<String>) -> Error {
        Error::ModelUnsupported { name: self.name.to_owned(), message: message.into() }
    }

    pub(crate) fn within(self, key: &str, value: usize, range: RangeInclusive<usize>) -> Result<()> {
        if range.contains(&value) {
            return Ok(());
        }
        let (low, high) = (range.start(), range.end());
        Err(self.refuse(format!("`{key}` must be between {low} and {high}, got {value}")))
    }

    pub(crate) fn channels(self, key: &str, value: usize) -> Result<()> {
        self.within(key, value, 1..=MAX_CHANNELS)
    }

    pub(crate) fn epsilon(self, key: &str, value: f64) -> Result<()> {
        if value > 0.0 && value <= 0.1 {
            return Ok(());
        }
        Err(self.refuse(format!("`{key}` must be above 0 and at most 0.1, got {value}")))
    }

    /// `parts` must divide `whole`, and must not be zero.
    pub(crate) fn divides(self, key: &str, parts: usize, whole: usize) -> Result<()> {
        if parts > 0 && whole.is_multiple_of(parts) {
            return Ok(());
        }
        Err(self.refuse(format!("`{key}` must divide {whole} channels, got {parts}")))
    }

    pub(crate) fn is(self, key: &str, value: &str, known: &[&str]) -> Result<()> {
        if known.contains(&value) {
            return Ok(());
        }
        Err(self.refuse(format!("`{key}` must be `{}`, got `{value}`", known.join("` or `"))))
    }

    /// `wrong` is true if the key has a value under which the network computes something else.
    pub(crate) fn absent(self, key: &str, wrong: bool) -> Result<()> {
        if wrong { Err(self.refuse(format!("`{key}` changes the network in a way that is not built"))) } else { Ok(()) }
    }
}
