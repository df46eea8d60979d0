//! The networks of SDXL: both text encoders, UNet, VAE, ControlNets, adapters and the image encoders that these see with.
//! Configured by their own `config.json`, or by the shapes of their tensors where a single file has none; written against
//! [`crate::kernels`] alone.
//!
//! Layout: feature maps are `[B, H, W, C]`, tokens `[B, L, C]`. Activations run in the dtype of the input; weights are
//! kept in the dtype of the `VarBuilder`, or narrower. No network caches anything between calls.
//!
//! Every configuration has a `check`: what cannot be computed exactly as diffusers computes it is
//! `model_unsupported`, and so are sizes that no real network has, so that a hostile file cannot make the worker
//! divide by zero, overflow or allocate without bound.

pub mod attention;
pub mod clip;
pub mod clip_vision;
pub mod controlnet;
pub mod controlnet_config;
pub(crate) mod controlnet_union;
pub mod embeddings;
pub mod footprint;
pub mod interventions;
pub mod ip_adapter;
pub mod resnet;
pub mod t2i_adapter;
pub(crate) mod tiling;
pub mod unet;
pub mod unet_blocks;
pub mod unet_config;
pub mod vae;

use std::ops::RangeInclusive;

use candle_core::Error as CandleError;
use serde::Deserialize;

use crate::error::{Error, Result};

/// Called between the blocks of a network, so that cancellation and deadlines take effect within one evaluation.
pub type Check<'a> = &'a dyn Fn() -> Result<()>;

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

    /// Whether there is a value for each of `blocks`, and none beyond.
    #[must_use]
    pub fn fits(&self, blocks: usize) -> bool {
        match self {
            Self::Each(values) => values.len() == blocks,
            Self::Same(_) => true,
        }
    }
}

/// The most channels that a layer may have.
const MAX_CHANNELS: usize = 1 << 15;
/// The most resolutions of a UNet or VAE, and the most layers at one of them.
const MAX_BLOCKS: usize = 8;
const MAX_LAYERS: usize = 64;

/// Judges the values of a configuration. `name` is the network as its user knows it.
#[derive(Clone, Copy)]
pub(crate) struct Judge<'a> {
    name: &'a str,
}

impl Judge<'_> {
    fn refuse(self, message: impl Into<String>) -> Error {
        Error::ModelUnsupported { name: self.name.to_owned(), message: message.into() }
    }

    fn within(self, key: &str, value: usize, range: RangeInclusive<usize>) -> Result<()> {
        if range.contains(&value) {
            return Ok(());
        }
        let (low, high) = (range.start(), range.end());
        Err(self.refuse(format!("`{key}` must be between {low} and {high}, got {value}")))
    }

    fn channels(self, key: &str, value: usize) -> Result<()> {
        self.within(key, value, 1..=MAX_CHANNELS)
    }

    fn epsilon(self, key: &str, value: f64) -> Result<()> {
        if value > 0.0 && value <= 0.1 {
            return Ok(());
        }
        Err(self.refuse(format!("`{key}` must be above 0 and at most 0.1, got {value}")))
    }

    /// `parts` must divide `whole`, and is not zero.
    fn divides(self, key: &str, parts: usize, whole: usize) -> Result<()> {
        if parts > 0 && whole.is_multiple_of(parts) {
            return Ok(());
        }
        Err(self.refuse(format!("`{key}` must divide {whole} channels, got {parts}")))
    }

    fn is(self, key: &str, value: &str, known: &[&str]) -> Result<()> {
        if known.contains(&value) {
            return Ok(());
        }
        Err(self.refuse(format!("`{key}` must be `{}`, got `{value}`", known.join("` or `"))))
    }

    /// `wrong` says that the key has a value under which the network computes something else.
    fn absent(self, key: &str, wrong: bool) -> Result<()> {
        if wrong { Err(self.refuse(format!("`{key}` changes the network in a way that is not built"))) } else { Ok(()) }
    }
}

/// Names what a failed load means: weights that are not this network's are `model_unsupported`; the rest is the device's.
fn loading(stage: &'static str) -> impl Fn(CandleError) -> Error {
    move |source| {
        let mut inner = &source;
        while let CandleError::WithBacktrace { inner: next, .. }
        | CandleError::WithPath { inner: next, .. }
        | CandleError::Context { inner: next, .. } = inner
        {
            inner = next;
        }
        match inner {
            CandleError::CannotFindTensor { path } => {
                Error::ModelUnsupported { name: stage.to_owned(), message: format!("it has no tensor `{path}`") }
            }
            CandleError::SafeTensor(reason) => {
                Error::ModelUnsupported { name: stage.to_owned(), message: reason.to_string() }
            }
            CandleError::UnexpectedShape { msg, expected, got } => Error::ModelUnsupported {
                name: stage.to_owned(),
                message: format!("a tensor must be {expected:?}, got {got:?}: {msg}"),
            },
            _ => Error::of_tensors(stage, source),
        }
    }
}
