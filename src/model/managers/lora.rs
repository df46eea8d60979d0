//! Networks as they are kept: with their layers by name, so that one that adapters change in part shares the rest with the
//! one that they do not change, or with one that they change otherwise.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;

use candle_nn::VarBuilder;

use crate::context::Context;
use crate::error::Result;
use crate::kernels::shared_layers::{Layer, Layers, sharing};
use crate::model::checkpoint::Part;
use crate::model::lora::LoraStack;
use crate::model::lora::merge::{PatchedNetwork, build_patched};
use crate::model::managers::{Opened, Shelf, ShelfKey};
use crate::units::Bytes;

/// A network, its layers, and what tells the changes of each.
#[derive(Debug)]
pub struct Kept<T> {
    network: T,
    layers: Layers,
    marks: HashMap<String, u64>,
    held: Held,
}

/// Bytes of a network: of each layer, which another network may have too, and of all else.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    /// By what tells a layer from all others in memory.
    pub(crate) layers: HashMap<usize, Bytes>,
    pub(crate) rest: Bytes,
}

impl Held {
    /// Of two networks that are kept as one.
    pub(crate) fn with(mut self, other: Self) -> Self {
        self.layers.extend(other.layers);
        Self { rest: self.rest + other.rest, ..self }
    }
}

/// A network that was built, and what was had for it beside the layers that were given.
pub(crate) struct Loaded<T> {
    network: Kept<T>,
    given: Held,
    bytes: Bytes,
}

impl<T> Loaded<T> {
    /// The network, which keeps all that was read for it but `saved`.
    pub(crate) fn kept(self, saved: Bytes) -> Kept<T> {
        let Self { mut network, given, bytes } = self;
        network.weigh(&given, bytes.saturating_sub(saved));
        network
    }
}

impl<T> Kept<T> {
    /// Counts the layers that `given` does not, so that with all else they are the `bytes` which were had for them.
    fn weigh(&mut self, given: &Held, bytes: Bytes) {
        let of = |layer: &Layer| (layer.id(), Bytes(layer.bytes() as u64));
        let fresh: Vec<_> =
            self.layers.iter().map(|(_, layer)| of(layer)).filter(|(id, _)| !given.layers.contains_key(id)).collect();
        // A layer may hold a little more than was read for it, as a widened bias.
        let all = fresh.iter().map(|(_, bytes)| *bytes).sum::<Bytes>().max(Bytes(1));
        let counted =
            |own: Bytes| Bytes(if all > bytes { (own.0 as f64 / all.0 as f64 * bytes.0 as f64) as u64 } else { own.0 });
        let fresh: HashMap<usize, Bytes> = fresh.into_iter().map(|(id, own)| (id, counted(own))).collect();
        let rest = bytes.saturating_sub(fresh.values().copied().sum());
        let taken = self.layers.iter().map(|(_, layer)| layer.id());
        let shared = taken.filter_map(|id| Some((id, *given.layers.get(&id)?))).collect();
        self.held = Held { layers: fresh, rest }.with(Held { layers: shared, rest: Bytes(0) });
    }

    pub(crate) fn held(&self) -> &Held {
        &self.held
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.network
    }
}

/// A network that is about to be built: what it shares, and what is changed of it.
pub(crate) struct Adapting<'a> {
    stack: &'a LoraStack,
    part: Part,
    given: Layers,
    held: Held,
    marks: HashMap<String, u64>,
}

impl<'a> Adapting<'a> {
    /// Takes from the networks `of` donors, which are of the same checkpoint, device and dtype, what is the same in them.
    pub(crate) fn new<D, T>(
        stack: &'a LoraStack,
        part: Part,
        donors: &[Arc<D>],
        of: impl Fn(&D) -> Option<&Kept<T>>,
    ) -> Self {
        let marks = stack.fingerprints(part);
        let (mut given, mut held) = (Layers::default(), Held::default());
        for donor in donors.iter().filter_map(|donor| of(donor)) {
            for (name, layer) in donor.layers.iter() {
                if donor.marks.get(name) == marks.get(name) && given.get(name).is_none() {
                    given.insert(name, layer.clone());
                    held.layers.extend(donor.held.layers.get(&layer.id()).map(|bytes| (layer.id(), *bytes)));
                }
            }
        }
        Self { stack, part, given, held, marks }
    }

    /// What it shares.
    pub(crate) fn shares(&self) -> &Held {
        &self.held
    }

    /// Bytes that the weights will take which are not shared.
    pub(crate) fn bytes(&self, opened: &Opened) -> Bytes {
        opened.bytes_of(|tensor| tensor.rsplit_once('.').is_none_or(|(layer, _)| self.given.get(layer).is_none()))
    }

    /// Builds the network.
    pub(crate) fn load<T>(
        self,
        opened: &Opened,
        ctx: &Context,
        load: impl FnOnce(&VarBuilder) -> Result<T>,
    ) -> Result<Loaded<T>> {
        let Self { stack, part, given, held, marks } = self;
        let known: HashSet<&str> = given.names().collect();
        let patches = stack.patches(part, &known, ctx)?;
        drop(known);
        let (loaded, layers) = sharing(given, || {
            opened.load(ctx, |vb| match patches.layers.is_empty() {
                true => load(vb).map(|network| PatchedNetwork { network, spent: Vec::new(), added: Bytes(0) }),
                false => build_patched(&patches, vb, ctx, load),
            })
        });
        let (PatchedNetwork { network, spent, added }, bytes) = loaded?;
        spent.into_iter().enumerate().for_each(|(adapter, time)| stack.add_time(adapter, time));
        let network = Kept { network, layers, marks, held: Held::default() };
        Ok(Loaded { network, given: held, bytes: bytes + added })
    }
}

/// What of a shelf may give layers to a network of this key.
pub(crate) fn donors<T: 'static>(shelf: &Shelf<T>, key: &ShelfKey) -> Vec<Arc<T>> {
    shelf.like(|other| ShelfKey { over: key.over, ..other.clone() } == *key)
}
