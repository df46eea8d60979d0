//! Shelves on which managers keep networks of one kind, within the budget of all shelves.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use crate::device::instructor::Placement;
use crate::device::interface::{Dtype, Quantization};
use crate::layers::{Manager, Resident, ResidentForm};
use crate::model::checkpoint::{Checkpoint, CheckpointKey};
use crate::model::managers::budget::{Budget, BudgetEntry, BudgetShelf, Used, give_back};
use crate::units::Bytes;

/// Key of a network on a shelf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShelfKey {
    pub checkpoint: CheckpointKey,
    /// Key of the adapters or files that change the checkpoint's network.
    pub over: Option<CheckpointKey>,
    pub form: ResidentForm,
    /// `cpu`, `cuda:0`, `metal`
    pub device: String,
}

impl ShelfKey {
    pub(crate) fn new(checkpoint: &Checkpoint, placement: &Placement, dtype: Dtype) -> Self {
        let form = ResidentForm { dtype, quantization: Quantization::None, offloaded: false };
        Self { checkpoint: checkpoint.key, over: None, form, device: placement.name.clone() }
    }
}

/// Bytes of a network: of each layer, which other networks may share, and of everything else.
#[derive(Clone, Debug, Default)]
pub(crate) struct LayerBytes {
    /// By the layer's id.
    pub(crate) layers: HashMap<usize, Bytes>,
    pub(crate) rest: Bytes,
}

impl LayerBytes {
    /// Bytes of two networks that are kept as one.
    pub(crate) fn with(mut self, other: Self) -> Self {
        self.layers.extend(other.layers);
        Self { rest: self.rest + other.rest, ..self }
    }
}

/// Networks of one kind, least recently used first. The one that a request needs now is always kept, however large;
/// others stay while all shelves together fit their budget.
pub struct Shelf<T> {
    entries: Rc<ShelfEntries<T>>,
    budget: Budget,
}

struct ShelfEntries<T> {
    kind: &'static str,
    list: RefCell<Vec<ShelfEntry<T>>>,
    /// Shared layers of a network that is about to be loaded: they stay, even if the network that they come from goes.
    incoming: RefCell<LayerBytes>,
}

struct ShelfEntry<T> {
    key: ShelfKey,
    name: String,
    held: LayerBytes,
    pinned: bool,
    used: Used,
    item: Arc<T>,
}

impl<T: 'static> Shelf<T> {
    #[must_use]
    pub fn new(kind: &'static str, budget: &Budget) -> Self {
        let entries = Rc::new(ShelfEntries { kind, list: RefCell::default(), incoming: RefCell::default() });
        budget.join(Rc::<ShelfEntries<T>>::clone(&entries));
        Self { entries, budget: budget.clone() }
    }

    pub(crate) fn kind(&self) -> &'static str {
        self.entries.kind
    }

    /// The item, which becomes the most recently used.
    pub fn get(&mut self, key: &ShelfKey) -> Option<Arc<T>> {
        let mut list = self.entries.list.borrow_mut();
        let index = list.iter().position(|entry| entry.key == *key)?;
        let mut entry = list.remove(index);
        entry.used = self.budget.used();
        let item = Arc::clone(&entry.item);
        list.push(entry);
        Some(item)
    }

    /// The items whose keys `is_wanted` accepts.
    pub(crate) fn matching(&self, is_wanted: impl Fn(&ShelfKey) -> bool) -> Vec<Arc<T>> {
        self.entries
            .list
            .borrow()
            .iter()
            .filter(|entry| is_wanted(&entry.key))
            .map(|entry| Arc::clone(&entry.item))
            .collect()
    }

    /// Frees memory for an item before it is loaded, so that the old and the new need not fit together.
    pub fn reserve(&mut self, bytes: Bytes) {
        self.budget.reserve(bytes);
    }

    /// [`Self::reserve`] for an item that shares layers with others: these may be evicted, but not the shared layers.
    pub(crate) fn reserve_sharing(&mut self, bytes: Bytes, shared: &LayerBytes) {
        self.entries.incoming.replace(shared.clone());
        self.reserve(bytes);
        self.entries.incoming.take();
    }

    /// Keeps the item as the most recently used, and evicts others until all fit the budget.
    pub fn insert(&mut self, key: ShelfKey, name: &str, bytes: Bytes, item: T) -> Arc<T> {
        self.insert_sharing(key, name, LayerBytes { rest: bytes, ..LayerBytes::default() }, item)
    }

    /// [`Self::insert`] of an item that may share layers with others.
    pub(crate) fn insert_sharing(&mut self, key: ShelfKey, name: &str, held: LayerBytes, item: T) -> Arc<T> {
        self.entries.retain(|entry| entry.key != key);
        let (item, used) = (Arc::new(item), self.budget.used());
        let entry = ShelfEntry { key, name: name.to_owned(), held, pinned: false, used, item: Arc::clone(&item) };
        self.entries.list.borrow_mut().push(entry);
        // The new item stays, as it is held here, and shared layers are counted with it.
        self.reserve(Bytes(0));
        item
    }

    /// Drops every item of a checkpoint, pinned or not; `None` drops all. Returns the bytes that were freed.
    pub fn remove(&mut self, checkpoint: Option<CheckpointKey>) -> Bytes {
        let freed = self.entries.retain(|entry| checkpoint.is_some_and(|key| key != entry.key.checkpoint));
        give_back(freed);
        freed
    }

    /// Drops the items of a checkpoint that are not pinned.
    pub(crate) fn remove_unpinned(&mut self, checkpoint: CheckpointKey) {
        give_back(self.entries.retain(|entry| entry.pinned || entry.key.checkpoint != checkpoint));
    }

    /// Drops the items of a checkpoint that are of this form, unless they are pinned.
    pub(crate) fn remove_form(&mut self, checkpoint: CheckpointKey, form: ResidentForm) {
        let stays = |key: &ShelfKey| key.checkpoint != checkpoint || key.form != form;
        give_back(self.entries.retain(|entry| entry.pinned || stays(&entry.key)));
    }

    /// Marks items of a checkpoint as used by the running request: those that `over` changes, and if `bare` those that
    /// nothing changes, in the forms that `is_used` accepts.
    pub(crate) fn claim(
        &mut self,
        checkpoint: CheckpointKey,
        over: &[CheckpointKey],
        bare: bool,
        is_used: impl Fn(ResidentForm) -> bool,
    ) {
        let over = |key: &ShelfKey| key.over.map_or(bare, |above| over.contains(&above));
        let is_wanted = |key: &ShelfKey| key.checkpoint == checkpoint && over(key) && is_used(key.form);
        for entry in self.entries.list.borrow_mut().iter_mut().filter(|entry| is_wanted(&entry.key)) {
            entry.used = self.budget.used();
        }
    }

    /// Protects items of a checkpoint from eviction, or ends that.
    pub fn pin(&mut self, checkpoint: CheckpointKey, pinned: bool) {
        let mut list = self.entries.list.borrow_mut();
        for entry in list.iter_mut().filter(|entry| entry.key.checkpoint == checkpoint) {
            entry.pinned = pinned;
        }
    }

    /// Bytes of one item; `None` if it is not here.
    #[must_use]
    pub fn bytes_at(&self, key: &ShelfKey) -> Option<Bytes> {
        let index = self.entries.list.borrow().iter().position(|entry| entry.key == *key)?;
        self.entries.counted().get(index).copied()
    }

    /// Bytes of all items of a checkpoint.
    #[must_use]
    pub fn bytes_of(&self, checkpoint: CheckpointKey) -> Bytes {
        self.entries.bytes(|entry| entry.key.checkpoint == checkpoint)
    }

    /// Bytes of all items.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.entries.bytes(|_| true)
    }
}

impl<T> ShelfEntries<T> {
    fn bytes(&self, wanted: impl Fn(&ShelfEntry<T>) -> bool) -> Bytes {
        let list = self.list.borrow();
        list.iter().zip(self.counted()).filter(|(entry, _)| wanted(entry)).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of each entry. A layer that several have is counted with the one that is evicted last, so that evicting an
    /// entry frees exactly its count.
    fn counted(&self) -> Vec<Bytes> {
        let list = self.list.borrow();
        let mut order: Vec<(usize, &ShelfEntry<T>)> = list.iter().enumerate().collect();
        order.sort_by_key(|(_, entry)| (entry.pinned || entry.is_busy(), entry.used.order()));
        let incoming = self.incoming.borrow();
        let mut known: HashSet<usize> = incoming.layers.keys().copied().collect();
        let mut all = vec![Bytes(0); list.len()];
        for (index, ShelfEntry { held, .. }) in order.into_iter().rev() {
            let own = held.layers.iter().filter(|(id, _)| known.insert(**id)).map(|(_, bytes)| *bytes).sum::<Bytes>();
            if let Some(bytes) = all.get_mut(index) {
                *bytes = own + held.rest;
            }
        }
        all
    }

    fn all_bytes(&self) -> Bytes {
        self.counted().into_iter().sum::<Bytes>() + self.incoming_bytes()
    }

    fn incoming_bytes(&self) -> Bytes {
        self.incoming.borrow().layers.values().copied().sum()
    }

    /// Drops the entries that `stays` rejects, once the list is whole again. Returns the bytes that this frees.
    fn retain(&self, mut stays: impl FnMut(&ShelfEntry<T>) -> bool) -> Bytes {
        let before = self.all_bytes();
        let all = self.list.take();
        let (kept, gone): (Vec<_>, Vec<_>) = all.into_iter().partition(|entry| stays(entry));
        *self.list.borrow_mut() = kept;
        drop(gone);
        before.saturating_sub(self.all_bytes())
    }
}

impl<T> ShelfEntry<T> {
    /// True if a computation holds the item.
    fn is_busy(&self) -> bool {
        Arc::strong_count(&self.item) > 1
    }
}

impl<T> BudgetShelf for ShelfEntries<T> {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn entries(&self) -> Vec<BudgetEntry> {
        let of = |(entry, bytes): (&ShelfEntry<T>, Bytes)| BudgetEntry {
            used: entry.used,
            bytes,
            pinned: entry.pinned,
            busy: entry.is_busy(),
        };
        let incoming = BudgetEntry { used: Used::default(), bytes: self.incoming_bytes(), pinned: false, busy: true };
        let incoming = Some(incoming).filter(|incoming| incoming.bytes > Bytes(0));
        self.list.borrow().iter().zip(self.counted()).map(of).chain(incoming).collect()
    }

    fn discard(&self, used: Used) -> Bytes {
        self.retain(|entry| entry.used != used)
    }
}

impl<T> Manager for Shelf<T> {
    fn resident(&self) -> Vec<Resident> {
        let resident = |(entry, bytes): (&ShelfEntry<T>, Bytes)| Resident {
            kind: self.entries.kind,
            name: entry.name.clone(),
            bytes,
            pinned: entry.pinned,
            used_ms: Some(entry.used.at),
            form: Some(entry.key.form),
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

#[cfg(test)]
mod tests {
    use super::{
        Budget, Bytes, CheckpointKey, Dtype, LayerBytes, Manager, Quantization, ResidentForm, Shelf, ShelfKey,
    };

    fn key(over: u64) -> ShelfKey {
        let over = Some(CheckpointKey::of(&over)).filter(|_| over > 0);
        let form = ResidentForm { dtype: Dtype::F32, quantization: Quantization::None, offloaded: false };
        ShelfKey { checkpoint: CheckpointKey::of(&1), over, form, device: "cpu".into() }
    }

    /// Layers of 10 bytes, and 1 byte of everything else.
    fn held(layers: &[usize]) -> LayerBytes {
        LayerBytes { layers: layers.iter().map(|&id| (id, Bytes(10))).collect(), rest: Bytes(1) }
    }

    fn three(capacity: u64) -> Shelf<u8> {
        let mut shelf = Shelf::new("unet", &Budget::new(Bytes(capacity)));
        for (over, layers) in [(0, [1, 2, 3]), (1, [1, 2, 4]), (2, [1, 5, 6])] {
            shelf.insert_sharing(key(over), "m", held(&layers), 0);
        }
        shelf
    }

    fn each(shelf: &Shelf<u8>) -> Vec<u64> {
        shelf.resident().iter().map(|one| one.bytes.0).collect()
    }

    #[test]
    fn shared_layers_are_counted_with_the_network_that_is_evicted_last() {
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
    fn evicting_a_network_frees_only_layers_that_the_incoming_one_does_not_share() {
        assert_eq!(each(&three(60)), [21, 31], "the first went for the third");
        let mut shelf = three(63);
        // The fourth has the layers of the third and one more.
        shelf.reserve_sharing(Bytes(11), &LayerBytes { rest: Bytes(0), ..held(&[1, 5, 6]) });
        assert_eq!(each(&shelf), [21, 31]);
        shelf.insert_sharing(key(3), "m", held(&[1, 5, 6, 7]), 0);
        assert_eq!((each(&shelf), shelf.bytes()), (vec![21, 1, 41], Bytes(63)));
    }
}
