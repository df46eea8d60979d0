//! Long-lived weights, one manager a network, and the shelf on which each keeps them.

mod adapters;
mod budget;
mod controlnet;
mod encoder;
mod lora;
mod tokenizer;
mod unet;
mod vae;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use candle_nn::VarBuilder;

pub use adapters::{Adapter, AdapterManager, shapes};
pub use budget::{Budget, Reach};
pub use controlnet::ControlNetManager;
pub use encoder::{ENCODERS, EncoderManager, TextEncoders};
pub use lora::Kept;
pub use tokenizer::{ClipTokenizer, Token, TokenizerManager, Tokenizers};
pub use unet::UnetManager;
pub use vae::{Vae, VaeManager};

use self::budget::{Line, Rack, Used, give_back};
use super::checkpoint::{Checkpoint, CheckpointKey, Part};
use super::workers::open::Weights;
use super::workers::read::{Read, ReadTask, kept_bytes};
use crate::context::Context;
use crate::device::instructor::Placement;
use crate::device::interface::{Dtype, Quantization};
use crate::error::{Error, Result};
use crate::layers::{Manager, Resident};
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

    fn form(&self) -> String {
        form(self.dtype, self.quantization, self.device.ends_with(AFAR))
    }
}

/// What follows the device of networks whose weights stay away from it.
const AFAR: &str = " from afar";

/// The [`Resident::form`] of a network.
#[must_use]
pub fn form(dtype: Dtype, quantization: Quantization, away: bool) -> String {
    format!("{} {}{}", dtype.name(), quantization.name(), if away { AFAR } else { "" })
}

/// Networks of one kind, least recently used first. The one that is wanted now is always kept, however large; others
/// stay as long as the budget, which they share with all other shelves, has place for them.
pub struct Shelf<T> {
    entries: Rc<Entries<T>>,
    budget: Budget,
}

struct Entries<T> {
    kind: &'static str,
    list: RefCell<Vec<Entry<T>>>,
}

struct Entry<T> {
    key: ShelfKey,
    name: String,
    bytes: Bytes,
    pinned: bool,
    used: Used,
    item: Arc<T>,
}

impl<T: 'static> Shelf<T> {
    #[must_use]
    pub fn new(kind: &'static str, budget: &Budget) -> Self {
        let entries = Rc::new(Entries { kind, list: RefCell::default() });
        budget.join(Rc::<Entries<T>>::clone(&entries));
        Self { entries, budget: budget.clone() }
    }

    /// The item, now the most recently used.
    pub fn get(&mut self, key: &ShelfKey) -> Option<Arc<T>> {
        let mut list = self.entries.list.borrow_mut();
        let place = list.iter().position(|entry| entry.key == *key)?;
        let mut entry = list.remove(place);
        entry.used = self.budget.used();
        let item = Arc::clone(&entry.item);
        list.push(entry);
        Some(item)
    }

    /// The items whose keys are `wanted`.
    pub(in crate::model) fn like(&self, wanted: impl Fn(&ShelfKey) -> bool) -> Vec<Arc<T>> {
        self.entries
            .list
            .borrow()
            .iter()
            .filter(|entry| wanted(&entry.key))
            .map(|entry| Arc::clone(&entry.item))
            .collect()
    }

    /// Makes place for an item before it is loaded, so that the old and the new need not fit together.
    pub fn reserve(&mut self, bytes: Bytes) {
        self.budget.reserve(bytes);
    }

    /// Keeps the item as the most recently used, and drops others while all do not fit the budget.
    pub fn insert(&mut self, key: ShelfKey, name: &str, bytes: Bytes, item: T) -> Arc<T> {
        self.entries.retain(|entry| entry.key != key);
        self.reserve(bytes);
        let (item, used) = (Arc::new(item), self.budget.used());
        let entry = Entry { key, name: name.to_owned(), bytes, pinned: false, used, item: Arc::clone(&item) };
        self.entries.list.borrow_mut().push(entry);
        item
    }

    /// Drops every item of a checkpoint, pinned or not; `None` drops all. Gives the bytes that were held.
    pub fn remove(&mut self, checkpoint: Option<CheckpointKey>) -> Bytes {
        let freed = self.entries.retain(|entry| checkpoint.is_some_and(|key| key != entry.key.checkpoint));
        give_back(freed);
        freed
    }

    /// Drops the items of a checkpoint that are not pinned.
    pub(in crate::model) fn let_go(&mut self, checkpoint: CheckpointKey) {
        give_back(self.entries.retain(|entry| entry.pinned || entry.key.checkpoint != checkpoint));
    }

    /// Drops the items of a checkpoint that are of this form, unless they are pinned.
    pub(in crate::model) fn drop_form(&mut self, checkpoint: CheckpointKey, form: &str) {
        let stays = |key: &ShelfKey| key.checkpoint != checkpoint || key.form() != form;
        give_back(self.entries.retain(|entry| entry.pinned || stays(&entry.key)));
    }

    /// The running request will use the items of a checkpoint as it is, and those over whose files `over` lies, which are
    /// held in one of these forms.
    pub(in crate::model) fn claim(
        &mut self,
        checkpoint: CheckpointKey,
        over: &[CheckpointKey],
        is_used: impl Fn(&str) -> bool,
    ) {
        let over = |key: &ShelfKey| key.over.is_none_or(|above| over.contains(&above));
        let wanted = |key: &ShelfKey| key.checkpoint == checkpoint && over(key) && is_used(&key.form());
        for entry in self.entries.list.borrow_mut().iter_mut().filter(|entry| wanted(&entry.key)) {
            entry.used = self.budget.used();
        }
    }

    /// Whether items of a checkpoint may be evicted.
    pub fn pin(&mut self, checkpoint: CheckpointKey, pinned: bool) {
        let mut list = self.entries.list.borrow_mut();
        for entry in list.iter_mut().filter(|entry| entry.key.checkpoint == checkpoint) {
            entry.pinned = pinned;
        }
    }

    /// Bytes that are held for one item; `None` if it is not here.
    #[must_use]
    pub fn bytes_at(&self, key: &ShelfKey) -> Option<Bytes> {
        self.entries.list.borrow().iter().find(|entry| entry.key == *key).map(|entry| entry.bytes)
    }

    /// Bytes that are held for one checkpoint.
    #[must_use]
    pub fn bytes_of(&self, checkpoint: CheckpointKey) -> Bytes {
        self.entries.bytes(|entry| entry.key.checkpoint == checkpoint)
    }

    /// Bytes that are held for all.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.entries.bytes(|_| true)
    }
}

impl<T> Entries<T> {
    fn bytes(&self, wanted: impl Fn(&Entry<T>) -> bool) -> Bytes {
        self.list.borrow().iter().filter(|entry| wanted(entry)).map(|entry| entry.bytes).sum()
    }

    /// Drops what does not stay, once the list is whole again. Gives its bytes.
    fn retain(&self, mut stays: impl FnMut(&Entry<T>) -> bool) -> Bytes {
        let all = self.list.take();
        let (kept, gone): (Vec<_>, Vec<_>) = all.into_iter().partition(|entry| stays(entry));
        *self.list.borrow_mut() = kept;
        gone.iter().map(|entry| entry.bytes).sum()
    }
}

impl<T> Rack for Entries<T> {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn lines(&self) -> Vec<Line> {
        let line = |entry: &Entry<T>| Line {
            used: entry.used,
            bytes: entry.bytes,
            pinned: entry.pinned,
            busy: Arc::strong_count(&entry.item) > 1,
        };
        self.list.borrow().iter().map(line).collect()
    }

    fn discard(&self, used: Used) -> Bytes {
        let mut list = self.list.borrow_mut();
        let Some(at) = list.iter().position(|entry| entry.used == used) else { return Bytes(0) };
        let gone = list.remove(at);
        // Networks that differ in what lies over their files share the rest, which is counted with one of them: what the
        // others share with it stays as long as they do.
        let shares = ["unet", "encoder"].contains(&self.kind);
        let like = |key: &ShelfKey| shares && *key == ShelfKey { over: key.over, ..gone.key.clone() };
        let heir = list.iter_mut().rev().find(|entry| like(&entry.key));
        let Some(heir) = heir else { return gone.bytes };
        let (less, more) = (heir.bytes.min(gone.bytes), heir.bytes.max(gone.bytes));
        heir.bytes = more;
        less
    }
}

impl<T> Manager for Shelf<T> {
    fn resident(&self) -> Vec<Resident> {
        let resident = |entry: &Entry<T>| Resident {
            kind: self.entries.kind,
            name: entry.name.clone(),
            bytes: entry.bytes,
            pinned: entry.pinned,
            used_ms: Some(entry.used.at),
            form: Some(entry.key.form()),
        };
        self.entries.list.borrow().iter().map(resident).collect()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        let mut freed = Bytes(0);
        let freed = self.entries.retain(|entry| {
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
const WORTH: Bytes = Bytes(8 * Bytes::MIB);

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
        ctx.perform(&Read, task)?.build(ctx, load).map_err(|error| match error {
            Error::OutOfMemory { stage, needed: Bytes(0), free, fits } => {
                Error::OutOfMemory { stage, needed: self.bytes(), free, fits }
            }
            other => other,
        })
    }
}
