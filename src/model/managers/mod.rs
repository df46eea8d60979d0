//! Long-lived weights, one manager a network, and the shelf on which each keeps them.

pub(crate) mod adapters;
pub(crate) mod budget;
pub(crate) mod controlnet;
pub(crate) mod encoder;
pub(crate) mod lora;
pub(crate) mod tokenizer;
pub(crate) mod unet;
pub(crate) mod vae;

use std::cell::RefCell;
use std::collections::HashSet;
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

use self::budget::{BudgetEntry, BudgetShelf, Used, give_back};
use self::lora::Held;
use crate::context::Context;
use crate::device::instructor::Placement;
use crate::device::interface::{Dtype, Quantization};
use crate::error::{Error, Result};
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::{Checkpoint, CheckpointKey, Part};
use crate::model::weights::open::Weights;
use crate::model::weights::read::{Read, ReadTask, kept_bytes};
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
    pub(crate) fn new(checkpoint: &Checkpoint, placement: &Placement, dtype: Dtype) -> Self {
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
    /// Layers of a network that is about to be loaded: they stay, whichever network gives them.
    coming: RefCell<Held>,
}

struct Entry<T> {
    key: ShelfKey,
    name: String,
    held: Held,
    pinned: bool,
    used: Used,
    item: Arc<T>,
}

impl<T: 'static> Shelf<T> {
    #[must_use]
    pub fn new(kind: &'static str, budget: &Budget) -> Self {
        let entries = Rc::new(Entries { kind, list: RefCell::default(), coming: RefCell::default() });
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
    pub(crate) fn like(&self, wanted: impl Fn(&ShelfKey) -> bool) -> Vec<Arc<T>> {
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

    /// [`Self::reserve`] for an item that shares layers with others, which may go, but not what it shares.
    fn reserve_beside(&mut self, bytes: Bytes, shared: &Held) {
        self.entries.coming.replace(shared.clone());
        self.reserve(bytes);
        self.entries.coming.take();
    }

    /// Keeps the item as the most recently used, and drops others while all do not fit the budget.
    pub fn insert(&mut self, key: ShelfKey, name: &str, bytes: Bytes, item: T) -> Arc<T> {
        self.insert_held(key, name, Held { rest: bytes, ..Held::default() }, item)
    }

    /// [`Self::insert`] of an item that may share layers with others.
    fn insert_held(&mut self, key: ShelfKey, name: &str, held: Held, item: T) -> Arc<T> {
        self.entries.retain(|entry| entry.key != key);
        let (item, used) = (Arc::new(item), self.budget.used());
        let entry = Entry { key, name: name.to_owned(), held, pinned: false, used, item: Arc::clone(&item) };
        self.entries.list.borrow_mut().push(entry);
        // It stays, as it is held here, and what it shares is counted with it.
        self.reserve(Bytes(0));
        item
    }

    /// Drops every item of a checkpoint, pinned or not; `None` drops all. Gives the bytes that were held.
    pub fn remove(&mut self, checkpoint: Option<CheckpointKey>) -> Bytes {
        let freed = self.entries.retain(|entry| checkpoint.is_some_and(|key| key != entry.key.checkpoint));
        give_back(freed);
        freed
    }

    /// Drops the items of a checkpoint that are not pinned.
    pub(crate) fn let_go(&mut self, checkpoint: CheckpointKey) {
        give_back(self.entries.retain(|entry| entry.pinned || entry.key.checkpoint != checkpoint));
    }

    /// Drops the items of a checkpoint that are of this form, unless they are pinned.
    pub(crate) fn drop_form(&mut self, checkpoint: CheckpointKey, form: &str) {
        let stays = |key: &ShelfKey| key.checkpoint != checkpoint || key.form() != form;
        give_back(self.entries.retain(|entry| entry.pinned || stays(&entry.key)));
    }

    /// The running request will use the items of a checkpoint over whose files `over` lies, and if `bare` those over whose
    /// files nothing does, of those forms that it uses.
    pub(crate) fn claim(
        &mut self,
        checkpoint: CheckpointKey,
        over: &[CheckpointKey],
        bare: bool,
        is_used: impl Fn(&str) -> bool,
    ) {
        let over = |key: &ShelfKey| key.over.map_or(bare, |above| over.contains(&above));
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
        let place = self.entries.list.borrow().iter().position(|entry| entry.key == *key)?;
        self.entries.counted().get(place).copied()
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
        let list = self.list.borrow();
        list.iter().zip(self.counted()).filter(|(entry, _)| wanted(entry)).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of each entry. A layer that several have is counted with the one that goes last, so that each frees what is
    /// counted with it when it is its turn to go.
    fn counted(&self) -> Vec<Bytes> {
        let list = self.list.borrow();
        let mut order: Vec<(usize, &Entry<T>)> = list.iter().enumerate().collect();
        order.sort_by_key(|(_, entry)| (entry.pinned || entry.is_busy(), entry.used.order()));
        let coming = self.coming.borrow();
        let mut known: HashSet<usize> = coming.layers.keys().copied().collect();
        let mut all = vec![Bytes(0); list.len()];
        for (place, Entry { held, .. }) in order.into_iter().rev() {
            let own = held.layers.iter().filter(|(id, _)| known.insert(**id)).map(|(_, bytes)| *bytes).sum::<Bytes>();
            if let Some(bytes) = all.get_mut(place) {
                *bytes = own + held.rest;
            }
        }
        all
    }

    fn all_bytes(&self) -> Bytes {
        self.counted().into_iter().sum::<Bytes>() + self.coming_bytes()
    }

    fn coming_bytes(&self) -> Bytes {
        self.coming.borrow().layers.values().copied().sum()
    }

    /// Drops what does not stay, once the list is whole again. Gives its bytes.
    fn retain(&self, mut stays: impl FnMut(&Entry<T>) -> bool) -> Bytes {
        let before = self.all_bytes();
        let all = self.list.take();
        let (kept, gone): (Vec<_>, Vec<_>) = all.into_iter().partition(|entry| stays(entry));
        *self.list.borrow_mut() = kept;
        drop(gone);
        before.saturating_sub(self.all_bytes())
    }
}

impl<T> Entry<T> {
    /// Whether somebody else holds it.
    fn is_busy(&self) -> bool {
        Arc::strong_count(&self.item) > 1
    }
}

impl<T> BudgetShelf for Entries<T> {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn entries(&self) -> Vec<BudgetEntry> {
        let of = |(entry, bytes): (&Entry<T>, Bytes)| BudgetEntry {
            used: entry.used,
            bytes,
            pinned: entry.pinned,
            busy: entry.is_busy(),
        };
        let coming = BudgetEntry { used: Used::default(), bytes: self.coming_bytes(), pinned: false, busy: true };
        let coming = Some(coming).filter(|coming| coming.bytes > Bytes(0));
        self.list.borrow().iter().zip(self.counted()).map(of).chain(coming).collect()
    }

    fn discard(&self, used: Used) -> Bytes {
        self.retain(|entry| entry.used != used)
    }
}

impl<T> Manager for Shelf<T> {
    fn resident(&self) -> Vec<Resident> {
        let resident = |(entry, bytes): (&Entry<T>, Bytes)| Resident {
            kind: self.entries.kind,
            name: entry.name.clone(),
            bytes,
            pinned: entry.pinned,
            used_ms: Some(entry.used.at),
            form: Some(entry.key.form()),
            over: entry.key.over.map(|over| over.0),
        };
        self.entries.list.borrow().iter().zip(self.entries.counted()).map(resident).collect()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        let mut freed = Bytes(0);
        while freed < want {
            let next = self.entries.list.borrow().iter().find(|entry| !entry.pinned).map(|entry| entry.used);
            let Some(used) = next else { break };
            freed = freed + self.entries.discard(used);
        }
        give_back(freed);
        freed
    }
}

/// A network whose header was read and whose weights were not.
pub(crate) struct Opened<'a> {
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
            Error::OutOfMemory { stage, needed: None, free, fits } => {
                Error::OutOfMemory { stage, needed: Some(self.bytes()), free, fits }
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Budget, Bytes, CheckpointKey, Dtype, Held, Manager, Quantization, Shelf, ShelfKey};

    fn key(over: u64) -> ShelfKey {
        let over = Some(CheckpointKey::of(&over)).filter(|_| over > 0);
        let (dtype, quantization) = (Dtype::F32, Quantization::None);
        ShelfKey { checkpoint: CheckpointKey::of(&1), over, dtype, quantization, device: "cpu".into() }
    }

    /// Layers of 10 bytes, and 1 beside.
    fn held(layers: &[usize]) -> Held {
        Held { layers: layers.iter().map(|&id| (id, Bytes(10))).collect(), rest: Bytes(1) }
    }

    fn three(capacity: u64) -> Shelf<u8> {
        let mut shelf = Shelf::new("unet", &Budget::new(Bytes(capacity)));
        for (over, layers) in [(0, [1, 2, 3]), (1, [1, 2, 4]), (2, [1, 5, 6])] {
            shelf.insert_held(key(over), "m", held(&layers), 0);
        }
        shelf
    }

    fn each(shelf: &Shelf<u8>) -> Vec<u64> {
        shelf.resident().iter().map(|one| one.bytes.0).collect()
    }

    #[test]
    fn what_networks_share_is_counted_once_and_goes_with_the_last() {
        let mut shelf = three(1000);
        assert_eq!(each(&shelf), [11, 21, 31]);
        assert_eq!(shelf.evict(Bytes(1)), Bytes(11));
        assert_eq!(shelf.evict(Bytes(1)), Bytes(21), "the second alone has what it shared with the first");
        assert_eq!((shelf.remove(None), shelf.bytes()), (Bytes(31), Bytes(0)));
        let mut shelf = three(1000);
        shelf.get(&key(0));
        assert_eq!(each(&shelf), [11, 21, 31], "the one that was used last has what is shared");
        assert_eq!((shelf.remove(None), shelf.bytes()), (Bytes(63), Bytes(0)));
    }

    #[test]
    fn a_network_whose_layers_are_taken_over_gives_only_the_others_back() {
        assert_eq!(each(&three(60)), [21, 31], "the first went for the third");
        let mut shelf = three(63);
        // The fourth has the layers of the third and one more.
        shelf.reserve_beside(Bytes(11), &Held { rest: Bytes(0), ..held(&[1, 5, 6]) });
        assert_eq!(each(&shelf), [21, 31]);
        shelf.insert_held(key(3), "m", held(&[1, 5, 6, 7]), 0);
        assert_eq!((each(&shelf), shelf.bytes()), (vec![21, 1, 41], Bytes(63)));
    }
}
