//! One budget for the weights of every kind, and the order in which they give way.
//!
//! What is wanted now is always kept, however large. Others stay as long as all of them together fit the capacity. The
//! first to go is what was used by the earliest request; of what one request used, the network that is cheapest to have
//! again: [`ORDER`]. Three things never go: what is pinned, what somebody computes with at this moment, as dropping that
//! would free nothing, and, unless memory has run out, what the running request has used.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::allocator;
use crate::model::managers::WORTH;
use crate::units::Bytes;

/// Kinds of networks that one request used, in the order in which they go; what is not named here goes before them.
const ORDER: [&str; 8] = ["image_encoder", "ip_adapter", "t2i_adapter", "lora", "encoder", "controlnet", "vae", "unet"];

/// What all shelves may hold together. Clones are the same budget.
#[derive(Clone)]
pub struct Budget(Rc<State>);

struct State {
    shelves: RefCell<Vec<Rc<dyn Rack>>>,
    capacity: Cell<Bytes>,
    /// What weights and feature maps may take together, where that is known.
    room: Cell<Option<Bytes>>,
    /// Counts requests; 0 where none is told of, and then nothing is protected.
    age: Cell<u64>,
    /// Counts uses.
    tick: Cell<u64>,
}

/// When something was last used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Used {
    age: u64,
    tick: u64,
    /// Milliseconds of Unix time.
    pub(crate) at: u64,
}

impl Used {
    /// Greater the later.
    pub(crate) fn order(self) -> u64 {
        self.tick
    }
}

/// An entry of a shelf as the budget sees it.
pub(crate) struct Line {
    pub(crate) used: Used,
    pub(crate) bytes: Bytes,
    pub(crate) pinned: bool,
    /// Whether somebody else holds it.
    pub(crate) busy: bool,
}

/// A shelf, whatever lies on it.
pub(crate) trait Rack {
    fn kind(&self) -> &'static str;
    fn lines(&self) -> Vec<Line>;
    /// Drops an entry. Gives the bytes that this frees.
    fn discard(&self, used: Used) -> Bytes;
}

/// How far making place may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// What the running request has used stays.
    Others,
    /// That may go too, where nobody computes with it now.
    Idle,
}

impl Budget {
    #[must_use]
    pub fn new(capacity: Bytes) -> Self {
        Self(Rc::new(State {
            shelves: RefCell::default(),
            capacity: Cell::new(capacity),
            room: Cell::new(None),
            age: Cell::new(0),
            tick: Cell::new(0),
        }))
    }

    /// A request begins, for which all may hold `capacity`, and all and its feature maps `room`.
    pub fn begin(&self, capacity: Bytes, room: Option<Bytes>) {
        self.0.age.set(self.0.age.get() + 1);
        self.0.capacity.set(capacity);
        self.0.room.set(room);
    }

    /// What [`Self::begin`] was told.
    #[must_use]
    pub fn room(&self) -> Option<Bytes> {
        self.0.room.get()
    }

    /// Bytes that are held.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.lines(|_| true).map(|(_, line)| line.bytes).sum()
    }

    /// Bytes that are held and pinned.
    #[must_use]
    pub fn pinned(&self) -> Bytes {
        self.lines(|line| line.pinned).map(|(_, line)| line.bytes).sum()
    }

    /// Bytes that [`Self::evict`] could free.
    #[must_use]
    pub fn evictable(&self, reach: Reach) -> Bytes {
        self.lines(|line| self.may_go(line, reach)).map(|(_, line)| line.bytes).sum()
    }

    /// Makes place for `bytes` before they are there, so that the old and the new need not fit together.
    pub(crate) fn reserve(&self, bytes: Bytes) {
        let excess = (self.bytes() + bytes).saturating_sub(self.0.capacity.get());
        if excess > Bytes(0) {
            self.evict(excess, Reach::Others);
        }
    }

    /// Frees at least `want` if it can, in the order written above. Gives what was freed.
    pub fn evict(&self, want: Bytes, reach: Reach) -> Bytes {
        let mut going: Vec<(Rc<dyn Rack>, Line)> = self.lines(|line| self.may_go(line, reach)).collect();
        going.sort_by_key(|(rack, Line { used, .. })| {
            let rank = ORDER.iter().position(|kind| *kind == rack.kind());
            (used.age, rank.map_or(0, |rank| rank + 1), used.tick)
        });
        let mut freed = Bytes(0);
        for (rack, line) in going {
            if freed >= want {
                break;
            }
            freed = freed + rack.discard(line.used);
        }
        give_back(freed);
        freed
    }

    /// A use at this moment.
    pub(crate) fn used(&self) -> Used {
        let tick = self.0.tick.get() + 1;
        self.0.tick.set(tick);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Used { age: self.0.age.get(), tick, at: u64::try_from(now.as_millis()).unwrap_or(u64::MAX) }
    }

    pub(crate) fn join(&self, rack: Rc<dyn Rack>) {
        self.0.shelves.borrow_mut().push(rack);
    }

    fn may_go(&self, line: &Line, reach: Reach) -> bool {
        let of_request = self.0.age.get() > 0 && line.used.age == self.0.age.get();
        !line.pinned && !line.busy && (reach == Reach::Idle || !of_request)
    }

    fn lines(&self, wanted: impl Fn(&Line) -> bool) -> impl Iterator<Item = (Rc<dyn Rack>, Line)> {
        let of = |rack: &Rc<dyn Rack>| rack.lines().into_iter().map(|line| (Rc::clone(rack), line)).collect::<Vec<_>>();
        let all: Vec<_> = self.0.shelves.borrow().iter().flat_map(of).filter(|(_, line)| wanted(line)).collect();
        all.into_iter()
    }
}

/// Returns what was freed to the system: the allocator keeps blocks for reuse, and the next weights have other sizes.
pub(crate) fn give_back(freed: Bytes) {
    if freed >= WORTH {
        allocator::release();
    }
}
