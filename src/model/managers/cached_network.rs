//! Networks with their layers by name, so that a network that adapters change in part shares all other layers with the
//! unchanged network, or with one that is changed otherwise.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;

use crate::context::Context;
use crate::error::Result;
use crate::kernels::{Layers, LoadPolicy, Loader, SharedLayer, WeightSource};
use crate::model::checkpoint::Part;
use crate::model::lora::LoraStack;
use crate::model::lora::merge::build_patched;
use crate::model::managers::opened::{OpenedNetwork, load};
use crate::model::managers::shelf::{LayerBytes, Shelf, ShelfKey};
use crate::units::Bytes;

/// A network, its layers, and a mark of each layer's changes.
#[derive(Debug)]
pub struct CachedNetwork<T> {
    network: T,
    layers: Layers,
    marks: HashMap<String, u64>,
    bytes: LayerBytes,
}

impl<T> CachedNetwork<T> {
    pub(crate) fn bytes(&self) -> &LayerBytes {
        &self.bytes
    }
}

impl<T> Deref for CachedNetwork<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.network
    }
}

/// A network that is about to be built: the layers that it shares, and its adapters.
pub(crate) struct NetworkBuild<'a> {
    stack: &'a LoraStack,
    part: Part,
    shared: Layers,
    shared_bytes: LayerBytes,
    marks: HashMap<String, u64>,
}

impl<'a> NetworkBuild<'a> {
    /// Shares the layers of donors that have the same changes. `network` picks the donor's network of the same part;
    /// donors are of the same checkpoint, device and form.
    pub(crate) fn new<D, T>(
        stack: &'a LoraStack,
        part: Part,
        donors: &[Arc<D>],
        network: impl Fn(&D) -> Option<&CachedNetwork<T>>,
    ) -> Self {
        let marks = stack.fingerprints(part);
        let (mut shared, mut shared_bytes) = (Layers::default(), LayerBytes::default());
        for donor in donors.iter().filter_map(|donor| network(donor)) {
            for (name, layer) in donor.layers.iter() {
                if donor.marks.get(name) == marks.get(name) && shared.get(name).is_none() {
                    shared.insert(name, layer.clone());
                    let bytes = donor.bytes.layers.get(&layer.id());
                    shared_bytes.layers.extend(bytes.map(|bytes| (layer.id(), *bytes)));
                }
            }
        }
        Self { stack, part, shared, shared_bytes, marks }
    }

    pub(crate) fn shared_bytes(&self) -> &LayerBytes {
        &self.shared_bytes
    }

    /// Bytes that the weights will take that are not shared.
    pub(crate) fn own_bytes(&self, opened: &OpenedNetwork) -> Bytes {
        opened.bytes_of(|tensor| tensor.rsplit_once('.').is_none_or(|(layer, _)| self.shared.get(layer).is_none()))
    }

    /// Builds the network.
    pub(crate) fn load<T>(
        self,
        opened: &OpenedNetwork,
        policy: LoadPolicy,
        ctx: &Context,
        build: impl FnOnce(&Loader) -> Result<T>,
    ) -> Result<CachedNetwork<T>> {
        let Self { stack, part, shared, shared_bytes, marks } = self;
        let known: HashSet<&str> = shared.names().collect();
        let patches = stack.patches(part, &known, ctx)?;
        drop(known);
        let policy = LoadPolicy { shared, ..policy };
        let build = |source: &dyn WeightSource| load(source, policy, build);
        let ((network, stats), spent) = opened.with_source(ctx, |source| match patches.layers.is_empty() {
            true => build(source).map(|built| (built, Vec::new())),
            false => build_patched(&patches, source, ctx, build),
        })?;
        spent.into_iter().enumerate().for_each(|(adapter, time)| stack.add_time(adapter, time));
        let bytes = count(&stats.layers, &shared_bytes, Bytes(stats.bytes() as u64));
        Ok(CachedNetwork { network, layers: stats.layers, marks, bytes })
    }
}

/// Bytes of each of `layers`, of which `shared` are counted elsewhere, so that all others and the rest add up to `read`.
fn count(layers: &Layers, shared: &LayerBytes, read: Bytes) -> LayerBytes {
    let bytes = |layer: &SharedLayer| (layer.id(), Bytes(layer.bytes() as u64));
    let own: Vec<_> =
        layers.iter().map(|(_, layer)| bytes(layer)).filter(|(id, _)| !shared.layers.contains_key(id)).collect();
    // A layer may hold a little more than was read for it, as a widened bias.
    let sum = own.iter().map(|(_, bytes)| *bytes).sum::<Bytes>().max(Bytes(1));
    let counted =
        |own: Bytes| Bytes(if sum > read { (own.0 as f64 / sum.0 as f64 * read.0 as f64) as u64 } else { own.0 });
    let own: HashMap<usize, Bytes> = own.into_iter().map(|(id, bytes)| (id, counted(bytes))).collect();
    let rest = read.saturating_sub(own.values().copied().sum());
    let used = layers.iter().filter_map(|(_, layer)| Some((layer.id(), *shared.layers.get(&layer.id())?)));
    LayerBytes { layers: own, rest }.with(LayerBytes { layers: used.collect(), rest: Bytes(0) })
}

/// Networks on a shelf that may share layers with one of this key.
pub(crate) fn donors<T: 'static>(shelf: &Shelf<T>, key: &ShelfKey) -> Vec<Arc<T>> {
    shelf.matching(|other| ShelfKey { over: key.over, ..other.clone() } == *key)
}
