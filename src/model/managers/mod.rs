//! Long-lived weights, one manager a network, and the shelf on which each keeps them.

mod adapters;
mod controlnet;
mod encoder;
mod lora;
mod tokenizer;
mod unet;
mod vae;

use std::sync::Arc;

use candle_nn::VarBuilder;

pub use adapters::{Adapter, AdapterManager, shapes};
pub use controlnet::ControlNetManager;
pub use encoder::{ENCODERS, EncoderManager, TextEncoders};
pub use lora::Kept;
pub use tokenizer::{ClipTokenizer, Token, TokenizerManager, Tokenizers};
pub use unet::UnetManager;
pub use vae::{Vae, VaeManager};

use super::checkpoint::{Checkpoint, CheckpointKey, Part};
use super::workers::open::Weights;
use super::workers::read::{Read, ReadTask, kept_bytes};
use crate::context::Context;
use crate::device::instructor::Placement;
use crate::device::interface::{Dtype, Quantization};
use crate::error::Result;
use crate::layers::{Manager, Resident};
use crate::memory;
use crate::units::Bytes;

/// What tells one network on a shelf from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShelfKey {
    pub checkpoint: CheckpointKey,
    /// The files that lie over the checkpoint's, for a network that is made of both.
    pub over: Option<CheckpointKey>,
    pub dtype: Dtype,
    pub quantization: Quantization,
    /// `cpu`, `cuda:0`, `metal`
    pub device: String,
}

impl ShelfKey {
    pub(in crate::model) fn new(checkpoint: &Checkpoint, placement: &Placement, dtype: Dtype) -> Self {
        let device = placement.name.clone();
        Self { checkpoint: checkpoint.key, over: None, dtype, quantization: Quantization::None, device }
    }
}

/// Networks of one kind, least recently used first. The one that is wanted now is always kept, however large; others
/// stay as long as all of them fit the capacity.
pub struct Shelf<T> {
    kind: &'static str,
    capacity: Bytes,
    entries: Vec<Entry<T>>,
}

struct Entry<T> {
    key: ShelfKey,
    name: String,
    bytes: Bytes,
    pinned: bool,
    item: Arc<T>,
}

impl<T> Shelf<T> {
    #[must_use]
    pub fn new(kind: &'static str, capacity: Bytes) -> Self {
        Self { kind, capacity, entries: Vec::new() }
    }

    /// The item, now the most recently used.
    pub fn get(&mut self, key: &ShelfKey) -> Option<Arc<T>> {
        let place = self.entries.iter().position(|entry| entry.key == *key)?;
        let entry = self.entries.remove(place);
        let item = Arc::clone(&entry.item);
        self.entries.push(entry);
        Some(item)
    }

    /// The items whose keys are `wanted`.
    pub(in crate::model) fn like(&self, wanted: impl Fn(&ShelfKey) -> bool) -> Vec<Arc<T>> {
        self.entries.iter().filter(|entry| wanted(&entry.key)).map(|entry| Arc::clone(&entry.item)).collect()
    }

    /// Makes place for an item before it is loaded, so that the old and the new need not fit together.
    pub fn reserve(&mut self, bytes: Bytes) {
        let excess = (self.bytes() + bytes).saturating_sub(self.capacity);
        if excess > Bytes(0) {
            self.evict(excess);
        }
    }

    /// Keeps the item as the most recently used, and drops others while all do not fit the capacity.
    pub fn insert(&mut self, key: ShelfKey, name: &str, bytes: Bytes, item: T) -> Arc<T> {
        self.entries.retain(|entry| entry.key != key);
        self.reserve(bytes);
        let item = Arc::new(item);
        self.entries.push(Entry { key, name: name.to_owned(), bytes, pinned: false, item: Arc::clone(&item) });
        item
    }

    /// Drops every item of a checkpoint, pinned or not; `None` drops all. Gives the bytes that were held.
    pub fn remove(&mut self, checkpoint: Option<CheckpointKey>) -> Bytes {
        let before = self.bytes();
        self.entries.retain(|entry| checkpoint.is_some_and(|key| key != entry.key.checkpoint));
        let freed = before.saturating_sub(self.bytes());
        give_back(freed);
        freed
    }

    /// Drops the items of a checkpoint that are not pinned.
    pub(in crate::model) fn let_go(&mut self, checkpoint: CheckpointKey) {
        let before = self.bytes();
        self.entries.retain(|entry| entry.pinned || entry.key.checkpoint != checkpoint);
        give_back(before.saturating_sub(self.bytes()));
    }

    /// Whether items of a checkpoint may be evicted.
    pub fn pin(&mut self, checkpoint: CheckpointKey, pinned: bool) {
        for entry in self.entries.iter_mut().filter(|entry| entry.key.checkpoint == checkpoint) {
            entry.pinned = pinned;
        }
    }

    /// Bytes that are held for one item; `None` if it is not here.
    #[must_use]
    pub fn bytes_at(&self, key: &ShelfKey) -> Option<Bytes> {
        self.entries.iter().find(|entry| entry.key == *key).map(|entry| entry.bytes)
    }

    /// Bytes that are held for one checkpoint.
    #[must_use]
    pub fn bytes_of(&self, checkpoint: CheckpointKey) -> Bytes {
        self.entries.iter().filter(|entry| entry.key.checkpoint == checkpoint).map(|entry| entry.bytes).sum()
    }

    /// Bytes that are held for all.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }
}

impl<T> Manager for Shelf<T> {
    fn resident(&self) -> Vec<Resident> {
        let resident = |entry: &Entry<T>| Resident {
            kind: self.kind,
            name: entry.name.clone(),
            bytes: entry.bytes,
            pinned: entry.pinned,
        };
        self.entries.iter().map(resident).collect()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        let mut freed = Bytes(0);
        self.entries.retain(|entry| {
            let stays = entry.pinned || freed >= want;
            if !stays {
                freed = freed + entry.bytes;
            }
            stays
        });
        give_back(freed);
        freed
    }
}

/// Freed bytes from which on it is worth asking the allocator to let go of them.
const WORTH: Bytes = Bytes(64 * Bytes::MIB);

/// Returns what was freed to the system: the allocator keeps blocks for reuse, and the next weights have other sizes.
fn give_back(freed: Bytes) {
    if freed >= WORTH {
        memory::release();
    }
}

/// A network whose header was read and whose weights were not.
struct Opened<'a> {
    /// What progress calls it.
    component: &'static str,
    weights: Weights,
    placement: &'a Placement,
    dtype: Dtype,
}

impl<'a> Opened<'a> {
    fn new(checkpoint: &Checkpoint, part: Part, placement: &'a Placement, dtype: Dtype, ctx: &Context) -> Result<Self> {
        Ok(Self { component: part.name(), weights: checkpoint.open(part, ctx)?, placement, dtype })
    }

    /// Bytes that the weights will take.
    fn bytes(&self) -> Bytes {
        self.bytes_of(|_| true)
    }

    /// Bytes that those weights will take whose names are `wanted`.
    fn bytes_of(&self, wanted: impl Fn(&str) -> bool) -> Bytes {
        kept_bytes(&self.weights, wanted, self.dtype, &self.placement.device)
    }

    /// Reads the weights and builds the network from them. Gives it with the bytes that it holds.
    fn load<T>(&self, ctx: &Context, load: impl FnOnce(&VarBuilder) -> Result<T>) -> Result<(T, Bytes)> {
        let (component, device) = (self.component, &self.placement.device);
        let task = ReadTask { component, weights: &self.weights, compute: self.dtype, device };
        ctx.perform(&Read, task)?.build(ctx, load)
    }
}
