//! The process's memory: the allocator behind everything that is allocated.
//!
//! Feature maps and weights are blocks of megabytes, made and dropped hundreds of times in one pass of a network. The
//! system's allocator returns such blocks at once, so that every pass has the kernel find, zero and map all of its
//! pages anew, four KiB at a time. Here they are aligned to huge pages, which are asked for, and a freed block waits
//! for the next request of its size. What is kept never raises the peak: live and kept blocks together stay beneath
//! what live blocks alone have once taken. What is small, and all of it where there is no Linux, goes to the system.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::units::Bytes;

/// Requests of this size and above are blocks of their own.
pub const LARGE: usize = 1 << 20;
/// What blocks are aligned to: a huge page of x86-64, and of ARM with pages of 4 KiB.
pub const HUGE: usize = 2 << 20;
/// Bytes of freed blocks that wait for reuse at most.
const KEPT: usize = 1 << 30;
/// Freed blocks that wait for reuse at most.
const PLACES: usize = 512;
/// Smallest step between two extents; a multiple of every page size in use.
const STEP: usize = 64 << 10;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator::new(KEPT);

/// What the process's large blocks take.
#[must_use]
pub fn usage() -> Usage {
    ALLOCATOR.usage()
}

/// Returns to the system what is free: the blocks that wait, and what C's allocator keeps. It is meant for moments after
/// which less is needed than before, such as when weights have been dropped.
pub fn release() {
    ALLOCATOR.release();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[expect(unsafe_code, reason = "the allocator for what is small is C's")]
    // SAFETY: `malloc_trim` has no preconditions, and touches only memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Large blocks, in bytes of address space: pages that were never written take no memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In use.
    pub live: Bytes,
    /// The most that was in use at once since the last release.
    pub peak: Bytes,
    /// Free, waiting for reuse.
    pub kept: Bytes,
}

/// Large blocks from the kernel, the rest from the system's allocator.
pub struct Allocator {
    limit: usize,
    state: Mutex<State>,
}

struct State {
    live: usize,
    peak: usize,
    kept: usize,
    /// Counts frees.
    turn: u64,
    count: usize,
    /// The first `count` are in use, in no order.
    blocks: [Block; PLACES],
}

#[derive(Clone, Copy)]
struct Block {
    start: usize,
    bytes: usize,
    /// When it was freed.
    turn: u64,
}

impl Allocator {
    /// One that keeps at most `limit` bytes of freed blocks.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        let blocks = [Block { start: 0, bytes: 0, turn: 0 }; PLACES];
        Self { limit, state: Mutex::new(State { live: 0, peak: 0, kept: 0, turn: 0, count: 0, blocks }) }
    }

    /// What the large blocks take.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let State { live, peak, kept, .. } = *self.state();
        Usage { live: Bytes(live as u64), peak: Bytes(peak as u64), kept: Bytes(kept as u64) }
    }

    /// Unmaps every block that waits for reuse. From here on the peak is counted anew.
    pub fn release(&self) {
        let mut state = self.state();
        while state.drop_oldest() {}
        state.peak = state.live;
    }

    /// No code that holds the lock can panic, so what a poisoned one guards is sound.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block for `size` bytes, and whether it is fresh, which is to say zero; null if the kernel has none.
    fn take(&self, size: usize) -> (*mut u8, bool) {
        let Some(bytes) = extent(size) else { return (std::ptr::null_mut(), false) };
        let mut state = self.state();
        let found = state.find(bytes);
        let start = found.or_else(|| pages::map(bytes)).or_else(|| {
            while state.drop_oldest() {}
            pages::map(bytes)
        });
        let Some(start) = start else { return (std::ptr::null_mut(), false) };
        state.live += bytes;
        state.peak = state.peak.max(state.live);
        (std::ptr::with_exposed_provenance_mut(start), found.is_none())
    }

    /// Takes back the block at `start` that was given for `size` bytes.
    fn put(&self, start: *mut u8, size: usize) {
        let Some(bytes) = extent(size) else { return };
        let start = start.expose_provenance();
        let mut state = self.state();
        state.live = state.live.saturating_sub(bytes);
        if bytes > self.limit {
            return pages::unmap(start, bytes);
        }
        while state.kept + bytes > self.limit || state.count >= PLACES {
            state.drop_oldest();
        }
        state.turn += 1;
        let (turn, count) = (state.turn, state.count);
        if let Some(place) = state.blocks.get_mut(count) {
            *place = Block { start, bytes, turn };
            state.count += 1;
            state.kept += bytes;
        }
    }

    /// Makes the block that was given for `old` bytes one for `new` bytes where it lies, if it is no smaller.
    fn shrink(&self, start: *mut u8, old: usize, new: usize) -> bool {
        let (Some(old), Some(new)) = (extent(old), extent(new)) else { return false };
        if new < old {
            let mut state = self.state();
            state.live = state.live.saturating_sub(old - new);
            pages::unmap(start.expose_provenance() + new, old - new);
        }
        new <= old
    }
}

impl State {
    /// A block of exactly `bytes`. If there is none and a fresh one would raise the peak, first one that is a little
    /// larger, cut to size; else what has waited longest is unmapped to make place.
    fn find(&mut self, bytes: usize) -> Option<usize> {
        let fits = |block: &Block, most: usize| (bytes..=most).contains(&block.bytes);
        let within = |state: &Self, most: usize| {
            let blocks = state.blocks.iter().take(state.count).enumerate();
            let best = blocks.filter(|(_, block)| fits(block, most));
            best.min_by_key(|(_, block)| (block.bytes, u64::MAX - block.turn)).map(|(at, _)| at)
        };
        if let Some(at) = within(self, bytes) {
            return self.remove(at).map(|block| block.start);
        }
        let over = |state: &Self| state.live + state.kept + bytes > state.peak;
        if over(self)
            && let Some(block) = within(self, bytes + bytes / 4).and_then(|at| self.remove(at))
        {
            pages::unmap(block.start + bytes, block.bytes - bytes);
            return Some(block.start);
        }
        while over(self) && self.drop_oldest() {}
        None
    }

    fn remove(&mut self, at: usize) -> Option<Block> {
        let last = self.count.checked_sub(1)?;
        let (block, moved) = (*self.blocks.get(at)?, *self.blocks.get(last)?);
        *self.blocks.get_mut(at)? = moved;
        self.count = last;
        self.kept -= block.bytes;
        Some(block)
    }

    /// Unmaps the block that has waited longest. `false` if none waits.
    fn drop_oldest(&mut self) -> bool {
        let oldest = self.blocks.iter().take(self.count).enumerate().min_by_key(|(_, block)| block.turn);
        let Some(block) = oldest.map(|(at, _)| at).and_then(|at| self.remove(at)) else { return false };
        pages::unmap(block.start, block.bytes);
        true
    }
}

/// Bytes of the block for `size` bytes: a sixteenth more at most, so that requests of nearly the same size can have each
/// other's blocks. It ends with a huge page where that costs no more than a sixteenth either.
fn extent(size: usize) -> Option<usize> {
    let step = ((size.checked_next_power_of_two()? / 2) / 16).max(STEP);
    let near = size.checked_next_multiple_of(step)?;
    let whole = near.checked_next_multiple_of(HUGE)?;
    Some(if whole - near <= near / 16 { whole } else { near })
}

/// Whether a request is served by blocks of its own.
fn large(size: usize, align: usize) -> bool {
    cfg!(target_os = "linux") && size >= LARGE && align <= HUGE
}

#[expect(unsafe_code, reason = "an allocator hands out memory")]
// SAFETY: a large block is mapped for this request alone, until it is given back; it is never smaller than its request,
// as `extent` is no smaller than its argument, and is aligned to `HUGE`. Which allocator a block belongs to, and how much
// is mapped for it, follow from its layout alone, which `dealloc` and `realloc` are given as `alloc` was. No method
// allocates or panics.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if large(layout.size(), layout.align()) {
            self.take(layout.size()).0
        } else {
            // SAFETY: the caller's promise is the system's.
            unsafe { System.alloc(layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !large(layout.size(), layout.align()) {
            // SAFETY: the caller's promise is the system's.
            return unsafe { System.alloc_zeroed(layout) };
        }
        let (start, fresh) = self.take(layout.size());
        if !fresh && !start.is_null() {
            // SAFETY: the block has at least this many bytes, and nobody else has it.
            unsafe { start.write_bytes(0, layout.size()) };
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if large(layout.size(), layout.align()) {
            self.put(start, layout.size());
        } else {
            // SAFETY: what is not large came from the system.
            unsafe { System.dealloc(start, layout) }
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let is_large = |size| large(size, layout.align());
        match (is_large(layout.size()), is_large(size)) {
            // SAFETY: what is not large came from the system, and stays there.
            (false, false) => return unsafe { System.realloc(start, layout, size) },
            (true, true) if self.shrink(start, layout.size(), size) => return start,
            _ => {}
        }
        // SAFETY: the caller promises that `size`, rounded up to the alignment, does not overflow; the blocks are
        // distinct, and both have the bytes that are copied.
        unsafe {
            let to = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !to.is_null() {
                std::ptr::copy_nonoverlapping(start, to, layout.size().min(size));
                self.dealloc(start, layout);
            }
            to
        }
    }
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "pages come from the kernel")]
mod pages {
    use super::HUGE;

    /// Fresh zeroed pages, aligned to `HUGE`; huge ones where the kernel has them. `bytes` is a multiple of the page.
    pub(super) fn map(bytes: usize) -> Option<usize> {
        let reserve = bytes.checked_add(HUGE)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at a place of the kernel's choice touches nothing that is there.
        let whole = unsafe { libc::mmap(std::ptr::null_mut(), reserve, access, kind, -1, 0) };
        if whole == libc::MAP_FAILED {
            return None;
        }
        let begin = whole.expose_provenance();
        let start = begin.next_multiple_of(HUGE);
        unmap(begin, start - begin);
        unmap(start + bytes, reserve - bytes - (start - begin));
        if bytes >= HUGE {
            // SAFETY: advice about pages that were just mapped; where it is not taken, pages are small.
            unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), bytes, libc::MADV_HUGEPAGE) };
        }
        Some(start)
    }

    /// Returns pages that nobody uses. The kernel refuses only where a process has too many mappings; then the pages stay.
    pub(super) fn unmap(start: usize, bytes: usize) {
        if bytes > 0 {
            // SAFETY: the range is within a mapping of `map`, and its owner has given it up.
            unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), bytes) };
        }
    }
}

/// Never reached: no request is large here.
#[cfg(not(target_os = "linux"))]
mod pages {
    pub(super) fn map(_bytes: usize) -> Option<usize> {
        None
    }

    pub(super) fn unmap(_start: usize, _bytes: usize) {}
}
