//! One budget for networks of every kind, and the order in which they are evicted.
//!
//! A network that is needed now is always kept, however large. Others stay as long as all of them together fit the
//! capacity. Networks of the earliest request are evicted first, and among those of one request the cheapest to get back:
//! [`ORDER`]. Never evicted are pinned networks, those in use at this moment, because that would free nothing, and, unless
//! memory has run out, those that the running request has used.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::allocator;
use crate::units::Bytes;

/// Order of eviction among the networks that one request used; kinds that are missing here are evicted first.
const ORDER: [&str; 8] = ["image_encoder", "ip_adapter", "t2i_adapter", "lora", "encoder", "controlnet", "vae", "unet"];

/// Limits the bytes that all shelves hold together. Clones share one budget.
#[derive(Clone)]
pub struct Budget(Rc<BudgetState>);

struct BudgetState {
    shelves: RefCell<Vec<Rc<dyn BudgetShelf>>>,
    capacity: Cell<Bytes>,
    /// Bytes for weights and feature maps together; `None` if unknown.
    usable: Cell<Option<Bytes>>,
    /// Number of the running request; `None` before the first, when nothing is protected.
    request: Cell<Option<u64>>,
    /// Number of uses so far.
    uses: Cell<u64>,
}

/// The time of a network's last use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Used {
    request: Option<u64>,
    number: u64,
    /// Milliseconds of Unix time.
    pub(crate) at: u64,
}

impl Used {
    /// Increases with each use.
    pub(crate) fn order(self) -> u64 {
        self.number
    }
}

/// A network on a shelf, as the budget sees it.
pub(crate) struct BudgetEntry {
    pub(crate) used: Used,
    pub(crate) bytes: Bytes,
    pub(crate) pinned: bool,
    /// True if it is in use.
    pub(crate) busy: bool,
}

/// A shelf of any network type.
pub(crate) trait BudgetShelf {
    fn kind(&self) -> &'static str;
    fn entries(&self) -> Vec<BudgetEntry>;
    /// Drops the entry last used at `used`, and returns the bytes freed.
    fn discard(&self, used: Used) -> Bytes;
}

/// The networks that may be evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Those that the running request has not used.
    Others,
    /// Those too, unless they are in use at this moment.
    Idle,
}

impl Budget {
    #[must_use]
    pub fn new(capacity: Bytes) -> Self {
        Self(Rc::new(BudgetState {
            shelves: RefCell::default(),
            capacity: Cell::new(capacity),
            usable: Cell::new(None),
            request: Cell::new(None),
            uses: Cell::new(0),
        }))
    }

    /// Begins a request: `capacity` is for all networks, `usable` for networks and feature maps.
    pub fn begin(&self, capacity: Bytes, usable: Option<Bytes>) {
        self.0.request.set(Some(self.0.request.get().map_or(0, |number| number + 1)));
        self.0.capacity.set(capacity);
        self.0.usable.set(usable);
    }

    /// Bytes for networks and feature maps of the running request; `None` if unknown.
    #[must_use]
    pub fn usable(&self) -> Option<Bytes> {
        self.0.usable.get()
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.entries(|_| true).map(|(_, entry)| entry.bytes).sum()
    }

    /// Bytes held and pinned.
    #[must_use]
    pub fn pinned(&self) -> Bytes {
        self.entries(|entry| entry.pinned).map(|(_, entry)| entry.bytes).sum()
    }

    /// Bytes that [`Self::evict`] could free.
    #[must_use]
    pub fn evictable(&self, reach: Reach) -> Bytes {
        self.entries(|entry| self.is_evictable(entry, reach)).map(|(_, entry)| entry.bytes).sum()
    }

    /// Evicts for `bytes` before they are loaded, so that old and new networks need not fit together.
    pub(crate) fn reserve(&self, bytes: Bytes) {
        let excess = (self.bytes() + bytes).saturating_sub(self.0.capacity.get());
        if excess > Bytes(0) {
            self.evict(excess, Reach::Others);
        }
    }

    /// Frees at least `want` if it can, in the module's order, and returns the bytes freed.
    pub fn evict(&self, want: Bytes, reach: Reach) -> Bytes {
        let mut candidates: Vec<(Rc<dyn BudgetShelf>, BudgetEntry)> =
            self.entries(|entry| self.is_evictable(entry, reach)).collect();
        candidates.sort_by_key(|(shelf, BudgetEntry { used, .. })| {
            let rank = ORDER.iter().position(|kind| *kind == shelf.kind());
            (used.request, rank.map_or(0, |rank| rank + 1), used.number)
        });
        let mut freed = Bytes(0);
        for (shelf, entry) in candidates {
            if freed >= want {
                break;
            }
            freed = freed + shelf.discard(entry.used);
        }
        give_back(freed);
        freed
    }

    /// Counts a use at this moment.
    pub(crate) fn used(&self) -> Used {
        let number = self.0.uses.get() + 1;
        self.0.uses.set(number);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Used { request: self.0.request.get(), number, at: u64::try_from(now.as_millis()).unwrap_or(u64::MAX) }
    }

    pub(crate) fn join(&self, shelf: Rc<dyn BudgetShelf>) {
        self.0.shelves.borrow_mut().push(shelf);
    }

    fn is_evictable(&self, entry: &BudgetEntry, reach: Reach) -> bool {
        let of_request = || self.0.request.get().is_some() && entry.used.request == self.0.request.get();
        !entry.pinned && !entry.busy && (reach == Reach::Idle || !of_request())
    }

    fn entries(
        &self,
        wanted: impl Fn(&BudgetEntry) -> bool,
    ) -> impl Iterator<Item = (Rc<dyn BudgetShelf>, BudgetEntry)> {
        let mut all = Vec::new();
        for shelf in self.0.shelves.borrow().iter() {
            let entries = shelf.entries().into_iter().filter(&wanted);
            all.extend(entries.map(|entry| (Rc::clone(shelf), entry)));
        }
        all.into_iter()
    }
}

/// Freed bytes from which it is worth asking the allocator to release memory.
const RELEASED_FROM: Bytes = Bytes(8 * Bytes::MIB);

/// Returns freed memory to the system: the allocator keeps blocks for reuse, but the next weights have other sizes.
pub(crate) fn give_back(freed: Bytes) {
    if freed >= RELEASED_FROM {
        allocator::release();
    }
}
