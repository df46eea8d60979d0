//! The layers and tensor shapes of one network of a checkpoint.

use std::collections::{BTreeSet, HashMap};

use crate::model::weights::open::Weights;

#[derive(Default)]
pub(crate) struct LayerIndex {
    /// Layer names by their flat form, with underscores in place of dots.
    layers: HashMap<String, String>,
    /// Shapes by tensor name.
    shapes: HashMap<String, Vec<usize>>,
}

impl LayerIndex {
    pub(crate) fn new(weights: &Weights) -> Self {
        Self::of(weights.tensors().map(|(name, stored)| (name, stored.shape.as_slice())))
    }

    pub(crate) fn of<'t>(tensors: impl Iterator<Item = (&'t str, &'t [usize])>) -> Self {
        let mut index = Self::default();
        for (name, shape) in tensors {
            index.shapes.insert(name.to_owned(), shape.to_vec());
            if let Some((layer, _)) = name.rsplit_once('.') {
                index.layers.insert(layer.replace('.', "_"), layer.to_owned());
            }
        }
        index
    }

    pub(crate) fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.shapes.get(tensor).map(Vec::as_slice)
    }

    /// The layer with this flat name.
    pub(crate) fn layer(&self, flat: &str) -> Option<&str> {
        self.layers.get(flat).map(String::as_str)
    }

    /// True if `name` is a layer or a block of layers.
    pub(crate) fn has_block(&self, name: &str) -> bool {
        self.layers
            .values()
            .any(|layer| layer.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    }

    /// Names of layers and of blocks of layers.
    pub(crate) fn blocks(&self) -> BTreeSet<&str> {
        let ends = |layer: &str| layer.match_indices('.').map(|(end, _)| end).chain([layer.len()]).collect::<Vec<_>>();
        let named = |layer| ends(layer).into_iter().filter_map(|end| layer.get(..end));
        self.layers.values().map(String::as_str).flat_map(named).collect()
    }
}
