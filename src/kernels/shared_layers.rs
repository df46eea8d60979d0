//! Layers by name, for networks that have some of them in common. Weights of a layer are never changed: networks that
//! share one hold handles to the same memory.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;

use crate::kernels::weight::{Weight, tensor_bytes};

/// Weights of one layer. Clones are handles to the same memory.
#[derive(Clone, Debug)]
pub(crate) struct LayerWeights {
    pub(crate) weight: Weight,
    /// In f32.
    pub(crate) bias: Option<Tensor>,
}

/// A layer that several networks may have. Clones are the same layer.
#[derive(Clone, Debug)]
pub struct SharedLayer(Arc<LayerWeights>);

impl SharedLayer {
    pub(crate) fn new(weights: LayerWeights) -> Self {
        Self(Arc::new(weights))
    }

    pub(crate) fn weights(&self) -> &LayerWeights {
        &self.0
    }

    /// Differs from the id of every other layer that is in memory at the same time.
    #[must_use]
    pub fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// Bytes of its weights.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.weight.bytes() + self.0.bias.as_ref().map_or(0, tensor_bytes)
    }
}

/// Layers by name.
#[derive(Clone, Debug, Default)]
pub struct Layers(HashMap<String, SharedLayer>);

impl Layers {
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&SharedLayer> {
        self.0.get(name)
    }

    pub fn insert(&mut self, name: &str, layer: SharedLayer) {
        self.0.insert(name.to_owned(), layer);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &SharedLayer)> {
        self.0.iter().map(|(name, layer)| (name.as_str(), layer))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}
