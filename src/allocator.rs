//! The process's memory: the allocator behind everything that is allocated.
//!
//! Feature maps and weights are blocks of megabytes, made and dropped hundreds of times in one pass of a network. The
//! system's allocator returns such blocks at once, so that every pass has the kernel find, zero and map all of its
//! pages anew, four KiB at a time. Here they are aligned to huge pages, which are asked for, and a freed block waits
//! for the next request of its size. What is kept never raises the peak: live and kept blocks together stay beneath
//! what live blocks alone have once taken. What is small, and all of it where there is no Linux, goes to the system.
//!
//! Weights need not be blocks at all: [`map_file`] gives a `Vec` whose memory is a part of a file, which the system
//! shares with its own cache of files and reads when it is touched. Such memory is told from blocks by its address alone:
//! blocks begin with a huge page, and it never does.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io;
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

/// A number that may come from a file: whatever its bits, they are a value.
///
/// # Safety
/// Every pattern of bits is a value, and nothing but the bits makes it one.
#[expect(unsafe_code, reason = "whoever says so answers for it")]
pub unsafe trait FromBits: Copy {}

#[expect(unsafe_code, reason = "any bits are an integer")]
// SAFETY: any bits are an integer.
unsafe impl FromBits for u8 {}
#[expect(unsafe_code, reason = "any bits are an integer")]
// SAFETY: any bits are an integer.
unsafe impl FromBits for u16 {}
#[expect(unsafe_code, reason = "any bits are an f32")]
// SAFETY: any bits are an f32.
unsafe impl FromBits for f32 {}

/// The `count` numbers that `file` has from byte `offset` on, none of them read yet: the memory is the file's. What is
/// written to it stays with this process. The file must neither be cut off nor be changed in place as long as it is in
/// use: the former ends the process, the latter changes the numbers; another file may take its name.
///
/// `None` where numbers are to be read instead: they are fewer than a block's, lie askew, or not within the file, or
/// the system has no such memory.
#[must_use]
pub fn map_file<T: FromBits>(file: &File, offset: u64, count: usize) -> Option<Vec<T>> {
    let bytes = count.checked_mul(size_of::<T>())?;
    let end = offset.checked_add(u64::try_from(bytes).ok()?)?;
    let straight = offset.is_multiple_of(align_of::<T>() as u64);
    if !large(bytes, align_of::<T>()) || !straight || end > file.metadata().ok()?.len() {
        return None;
    }
    let start = pages::map_file(file, offset, bytes)?;
    ALLOCATOR.state().mapped += bytes;
    #[expect(unsafe_code, reason = "the vector's memory comes from this allocator by another way")]
    // SAFETY: `bytes` bytes from `start` on are mapped for this vector alone, any bits are numbers, and `start` is as
    // aligned as `offset`, since pages are. The global allocator knows it by its address, and unmaps it.
    Some(unsafe { Vec::from_raw_parts(std::ptr::with_exposed_provenance_mut(start), count, count) })
}

/// Has the system read what of `mapped`, memory of [`map_file`], is not in memory, and enter it in this process's tables
/// of pages. A system that cannot do this at once begins to read.
///
/// # Errors
/// What keeps the file from being read.
pub fn populate(mapped: &[u8]) -> io::Result<()> {
    pages::populate(mapped.as_ptr().expose_provenance(), mapped.len())
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
    /// Parts of files, which are no blocks: their memory is the system's cache of files, which counts as available, and
    /// which it takes back when it needs to.
    pub mapped: Bytes,
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
    mapped: usize,
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
        Self { limit, state: Mutex::new(State { live: 0, peak: 0, kept: 0, mapped: 0, turn: 0, count: 0, blocks }) }
    }

    /// What the large blocks take.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let State { live, peak, kept, mapped, .. } = *self.state();
        let [live, peak, kept, mapped] = [live, peak, kept, mapped].map(|bytes| Bytes(bytes as u64));
        Usage { live, peak, kept, mapped }
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

    /// Takes back the block, or the part of a file, at `start` that was given for `size` bytes.
    fn put(&self, start: *mut u8, size: usize) {
        let Some(bytes) = extent(size) else { return };
        let start = start.expose_provenance();
        let mut state = self.state();
        if !is_block(start) {
            state.mapped = state.mapped.saturating_sub(size);
            drop(state);
            return pages::unmap_file(start, size);
        }
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
        if !is_block(start.expose_provenance()) {
            return false;
        }
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
    /// larger, cut to size; else what has waited longest makes place: if it is large enough the block is a part of it,
    /// which need not be zeroed and mapped anew, and else it is unmapped.
    fn find(&mut self, bytes: usize) -> Option<usize> {
        let within = |state: &Self, most: usize| {
            let blocks = state.blocks.iter().take(state.count).enumerate();
            let best = blocks.filter(|(_, block)| (bytes..=most).contains(&block.bytes));
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
        while over(self) {
            let block = self.oldest().and_then(|at| self.remove(at))?;
            if block.bytes >= bytes {
                self.cut(block, bytes);
                return Some(block.start);
            }
            pages::unmap(block.start, block.bytes);
        }
        None
    }

    /// Keeps of `block` what follows its first `bytes`, as a block that has waited as long.
    fn cut(&mut self, block: Block, bytes: usize) {
        let next = bytes.next_multiple_of(HUGE);
        let rest = block.bytes.saturating_sub(next);
        match self.blocks.get_mut(self.count) {
            Some(place) if rest >= LARGE => {
                pages::unmap(block.start + bytes, next - bytes);
                *place = Block { start: block.start + next, bytes: rest, turn: block.turn };
                self.count += 1;
                self.kept += rest;
            }
            _ => pages::unmap(block.start + bytes, block.bytes - bytes),
        }
    }

    fn remove(&mut self, at: usize) -> Option<Block> {
        let last = self.count.checked_sub(1)?;
        let (block, moved) = (*self.blocks.get(at)?, *self.blocks.get(last)?);
        *self.blocks.get_mut(at)? = moved;
        self.count = last;
        self.kept -= block.bytes;
        Some(block)
    }

    fn oldest(&self) -> Option<usize> {
        let blocks = self.blocks.iter().take(self.count).enumerate();
        blocks.min_by_key(|(_, block)| block.turn).map(|(at, _)| at)
    }

    /// Unmaps the block that has waited longest. `false` if none waits.
    fn drop_oldest(&mut self) -> bool {
        let Some(block) = self.oldest().and_then(|at| self.remove(at)) else { return false };
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

/// Whether large memory at `start` is a block, and no part of a file.
fn is_block(start: usize) -> bool {
    start.is_multiple_of(HUGE)
}

#[expect(unsafe_code, reason = "an allocator hands out memory")]
// SAFETY: a large block is mapped for this request alone, until it is given back; it is never smaller than its request,
// as `extent` is no smaller than its argument, and is aligned to `HUGE`. Which allocator a block belongs to, and how much
// is mapped for it, follow from its layout alone, which `dealloc` and `realloc` are given as `alloc` was, and for parts of
// files from their address too. No method allocates or panics.
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
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;

    use super::HUGE;

    /// `bytes` of `file` from `offset` on, at an address that is no multiple of `HUGE`. What is written stays here.
    pub(crate) fn map_file(file: &File, offset: u64, bytes: usize) -> Option<usize> {
        let page = page_size();
        let within = usize::try_from(offset % page as u64).ok()?;
        let from = offset - within as u64;
        let length = within.checked_add(bytes)?.checked_next_multiple_of(page)?;
        let reserve = length.checked_add(2 * HUGE)?;
        let kind = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at a place of the kernel's choice touches nothing that is there.
        let whole =
            unsafe { libc::mmap(std::ptr::null_mut(), reserve, libc::PROT_NONE, kind | libc::MAP_ANONYMOUS, -1, 0) };
        if whole == libc::MAP_FAILED {
            return None;
        }
        let begin = whole.expose_provenance();
        // As far from a huge page's beginning as in the file, so that runs of pages lie alike in both; but not on it.
        let into = usize::try_from(from % HUGE as u64).ok()?;
        let place = begin.next_multiple_of(HUGE) + if into + within == 0 { page } else { into };
        let (access, at) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::with_exposed_provenance_mut(place));
        let from = libc::off_t::try_from(from).ok();
        // SAFETY: the range is within the reservation, which nobody uses and this replaces: `place` is at most two huge
        // pages less a page behind `begin`.
        let made = from.is_some_and(|from| unsafe {
            libc::mmap(at, length, access, kind | libc::MAP_FIXED, file.as_raw_fd(), from) == at
        });
        if !made {
            unmap(begin, reserve);
            return None;
        }
        unmap(begin, place - begin);
        unmap(place + length, begin + reserve - (place + length));
        Some(place + within)
    }

    /// Ends what `map_file` made of `bytes` at `start`.
    pub(crate) fn unmap_file(start: usize, bytes: usize) {
        let (place, length) = whole_pages(start, bytes);
        unmap(place, length);
    }

    pub(crate) fn populate(start: usize, bytes: usize) -> io::Result<()> {
        let (place, length) = whole_pages(start, bytes);
        let advise = |advice| {
            // SAFETY: reading ahead changes no contents.
            match unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(place), length, advice) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let Err(error) = advise(libc::MADV_POPULATE_READ) else { return Ok(()) };
        match error.raw_os_error() {
            Some(libc::EFAULT | libc::EIO | libc::EHWPOISON) => Err(error),
            // A kernel of before 5.14.
            _ => advise(libc::MADV_WILLNEED).or(Ok(())),
        }
    }

    /// The pages that some memory lies on.
    fn whole_pages(start: usize, bytes: usize) -> (usize, usize) {
        let page = page_size();
        let within = start % page;
        (start - within, (within + bytes).next_multiple_of(page))
    }

    fn page_size() -> usize {
        // SAFETY: asks for a constant.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
    }

    /// Fresh zeroed pages, aligned to `HUGE`; huge ones where the kernel has them. `bytes` is a multiple of the page.
    pub(crate) fn map(bytes: usize) -> Option<usize> {
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
    pub(crate) fn unmap(start: usize, bytes: usize) {
        if bytes > 0 {
            // SAFETY: the range is within a mapping of `map` or `map_file`, and its owner has given it up.
            unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), bytes) };
        }
    }
}

/// Never reached: no request is large here.
#[cfg(not(target_os = "linux"))]
mod pages {
    use std::fs::File;
    use std::io;

    pub(crate) fn map_file(_file: &File, _offset: u64, _bytes: usize) -> Option<usize> {
        None
    }

    pub(crate) fn unmap_file(_start: usize, _bytes: usize) {}

    pub(crate) fn populate(_start: usize, _bytes: usize) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn map(_bytes: usize) -> Option<usize> {
        None
    }

    pub(crate) fn unmap(_start: usize, _bytes: usize) {}
}
