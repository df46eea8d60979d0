//! The global allocator. Large blocks come from the kernel and are reused; small ones come from the system's allocator.
//!
//! Feature maps and weights are blocks of megabytes that are made and dropped hundreds of times in one pass of a network.
//! The system's allocator returns such blocks to the kernel at once, so that every pass finds, zeroes and maps all of its
//! pages anew, 4 KiB at a time. Here they are aligned to huge pages, which are requested, and a freed block is cached for the
//! next request of its size. The cache never raises the peak: live and cached blocks together stay below the highest sum
//! of live blocks. Without Linux every request goes to the system's allocator.
//!
//! Weights need not be blocks: [`map_file`] returns a `Vec` whose memory is a part of a file, which the system shares with
//! its page cache and reads on access. Such memory is distinguished from blocks by its address: blocks begin at a huge page,
//! and mapped files never do.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::units::Bytes;

/// Requests of this size and above are blocks of their own.
pub const LARGE: usize = 1 << 20;
/// The alignment of blocks: a huge page of x86-64, and of ARM with pages of 4 KiB.
pub const HUGE: usize = 2 << 20;
/// Bytes of freed blocks that are cached, at most.
const MAX_CACHED_BYTES: usize = 1 << 30;
/// Freed blocks that are cached, at most.
const MAX_CACHED_BLOCKS: usize = 512;
/// The smallest step between two block sizes; a multiple of every page size in use.
const MIN_STEP: usize = 64 << 10;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator::new(MAX_CACHED_BYTES);

/// The memory of the process's large blocks.
#[must_use]
pub fn usage() -> Usage {
    ALLOCATOR.usage()
}

/// Returns free memory to the system: the cached blocks, and what C's allocator keeps. Call it when less memory is needed
/// than before, such as after weights have been dropped.
pub fn release() {
    ALLOCATOR.release();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[expect(unsafe_code, reason = "small blocks come from C's allocator")]
    // SAFETY: `malloc_trim` has no preconditions and touches only free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A plain number whose bits may come from a file or from zeroed memory.
///
/// # Safety
/// Every pattern of bits is a valid value.
#[expect(unsafe_code, reason = "implementations promise that all bits are valid")]
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

/// Maps the `count` numbers of `file` from byte `offset` on; none of them is read yet. Changes to the vector stay in this
/// process. As long as it is in use the file must not be truncated, which would end the process, nor be changed in base,
/// which would change the numbers; another file may take its name.
///
/// Returns `None` if the numbers have to be read instead: they are fewer than a block's, misaligned, or not within the
/// file, or the system cannot map them.
#[must_use]
pub fn map_file<T: FromBits>(file: &File, offset: u64, count: usize) -> Option<Vec<T>> {
    let bytes = count.checked_mul(size_of::<T>())?;
    let end = offset.checked_add(u64::try_from(bytes).ok()?)?;
    let is_aligned = offset.is_multiple_of(align_of::<T>() as u64);
    if !is_large(bytes, align_of::<T>()) || !is_aligned || end > file.metadata().ok()?.len() {
        return None;
    }
    let start = pages::map_file(file, offset, bytes)?;
    ALLOCATOR.state().mapped += bytes;
    #[expect(unsafe_code, reason = "the vector's memory is a mapped file that this allocator frees")]
    // SAFETY: `bytes` bytes from `start` on are mapped for this vector alone, any bits are numbers, and `start` is as
    // aligned as `offset`, since pages are. The global allocator recognizes the memory by its address and unmaps it.
    Some(unsafe { Vec::from_raw_parts(std::ptr::with_exposed_provenance_mut(start), count, count) })
}

/// Reads the pages of `mapped`, memory of [`map_file`], that are not in memory yet, and maps them into this process. A
/// system that cannot do this synchronously starts to read ahead.
///
/// # Errors
/// The file cannot be read.
pub fn populate(mapped: &[u8]) -> io::Result<()> {
    pages::populate(mapped.as_ptr().expose_provenance(), mapped.len())
}

/// Bytes of address space in large blocks. Pages that were never written take no memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In use.
    pub live: Bytes,
    /// The highest sum of blocks in use since the last release.
    pub peak: Bytes,
    /// Free, cached for reuse.
    pub cached: Bytes,
    /// Mapped parts of files, which are no blocks: their memory is the system's page cache, which counts as available and is
    /// reclaimed when needed.
    pub mapped: Bytes,
}

/// Allocates large blocks from the kernel and small ones from the system's allocator.
pub struct Allocator {
    limit: usize,
    state: Mutex<State>,
}

struct State {
    live: usize,
    peak: usize,
    cached: usize,
    mapped: usize,
    /// Blocks freed so far.
    frees: u64,
    count: usize,
    /// The first `count` are cached blocks, in no order.
    blocks: [CachedBlock; MAX_CACHED_BLOCKS],
}

#[derive(Clone, Copy)]
struct CachedBlock {
    start: usize,
    bytes: usize,
    /// The number of the free.
    freed: u64,
}

impl Allocator {
    /// Creates an allocator that caches at most `limit` bytes of freed blocks.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        let blocks = [CachedBlock { start: 0, bytes: 0, freed: 0 }; MAX_CACHED_BLOCKS];
        Self { limit, state: Mutex::new(State { live: 0, peak: 0, cached: 0, mapped: 0, frees: 0, count: 0, blocks }) }
    }

    /// The memory of the large blocks.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let State { live, peak, cached, mapped, .. } = *self.state();
        let [live, peak, cached, mapped] = [live, peak, cached, mapped].map(|bytes| Bytes(bytes as u64));
        Usage { live, peak, cached, mapped }
    }

    /// Unmaps every cached block and restarts the peak.
    pub fn release(&self) {
        let mut state = self.state();
        while state.drop_oldest() {}
        state.peak = state.live;
    }

    /// No code that holds the lock can panic, so the state behind a poisoned lock is consistent.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a block for `size` bytes, and true if it is fresh, that is, zero. The block is null if there is no memory.
    fn allocate(&self, size: usize) -> (*mut u8, bool) {
        let Some(bytes) = block_size(size) else { return (std::ptr::null_mut(), false) };
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

    /// Frees the block or the mapped file at `start` that was allocated for `size` bytes.
    fn free(&self, start: *mut u8, size: usize) {
        let Some(bytes) = block_size(size) else { return };
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
        while state.cached + bytes > self.limit || state.count >= MAX_CACHED_BLOCKS {
            state.drop_oldest();
        }
        state.frees += 1;
        let (freed, count) = (state.frees, state.count);
        if let Some(slot) = state.blocks.get_mut(count) {
            *slot = CachedBlock { start, bytes, freed };
            state.count += 1;
            state.cached += bytes;
        }
    }

    /// Shrinks the block that was allocated for `old` bytes in base to one for `new` bytes. Returns false if it cannot.
    fn shrink(&self, start: *mut u8, old: usize, new: usize) -> bool {
        let (Some(old), Some(new)) = (block_size(old), block_size(new)) else { return false };
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
    /// Takes a block of exactly `bytes` from the cache. If there is none and a fresh one would raise the peak, a slightly
    /// larger one is cut to size; else the oldest blocks go: one that is large enough is cut, which saves zeroing and mapping
    /// a part of it anew, and the others are unmapped.
    fn find(&mut self, bytes: usize) -> Option<usize> {
        let up_to = |state: &Self, largest: usize| {
            let blocks = state.blocks.iter().take(state.count).enumerate();
            let best = blocks.filter(|(_, block)| (bytes..=largest).contains(&block.bytes));
            best.min_by_key(|(_, block)| (block.bytes, u64::MAX - block.freed)).map(|(at, _)| at)
        };
        if let Some(at) = up_to(self, bytes) {
            return self.remove(at).map(|block| block.start);
        }
        let raises_peak = |state: &Self| state.live + state.cached + bytes > state.peak;
        if raises_peak(self)
            && let Some(block) = up_to(self, bytes + bytes / 4).and_then(|at| self.remove(at))
        {
            pages::unmap(block.start + bytes, block.bytes - bytes);
            return Some(block.start);
        }
        while raises_peak(self) {
            let block = self.oldest().and_then(|at| self.remove(at))?;
            if block.bytes >= bytes {
                self.cut(block, bytes);
                return Some(block.start);
            }
            pages::unmap(block.start, block.bytes);
        }
        None
    }

    /// Caches the rest of `block` behind its first `bytes`, as a block of the same age.
    fn cut(&mut self, block: CachedBlock, bytes: usize) {
        let next = bytes.next_multiple_of(HUGE);
        let rest = block.bytes.saturating_sub(next);
        match self.blocks.get_mut(self.count) {
            Some(slot) if rest >= LARGE => {
                pages::unmap(block.start + bytes, next - bytes);
                *slot = CachedBlock { start: block.start + next, bytes: rest, freed: block.freed };
                self.count += 1;
                self.cached += rest;
            }
            _ => pages::unmap(block.start + bytes, block.bytes - bytes),
        }
    }

    fn remove(&mut self, at: usize) -> Option<CachedBlock> {
        let last = self.count.checked_sub(1)?;
        let (block, moved) = (*self.blocks.get(at)?, *self.blocks.get(last)?);
        *self.blocks.get_mut(at)? = moved;
        self.count = last;
        self.cached -= block.bytes;
        Some(block)
    }

    fn oldest(&self) -> Option<usize> {
        let blocks = self.blocks.iter().take(self.count).enumerate();
        blocks.min_by_key(|(_, block)| block.freed).map(|(at, _)| at)
    }

    /// Unmaps the oldest cached block. Returns false if there is none.
    fn drop_oldest(&mut self) -> bool {
        let Some(block) = self.oldest().and_then(|at| self.remove(at)) else { return false };
        pages::unmap(block.start, block.bytes);
        true
    }
}

/// Bytes of the block for `size` bytes: at most a sixteenth more, so that requests of nearly the same size share blocks.
/// The block ends with a huge page if that costs no more than another sixteenth.
fn block_size(size: usize) -> Option<usize> {
    let step = ((size.checked_next_power_of_two()? / 2) / 16).max(MIN_STEP);
    let near = size.checked_next_multiple_of(step)?;
    let whole = near.checked_next_multiple_of(HUGE)?;
    Some(if whole - near <= near / 16 { whole } else { near })
}

/// True if a request gets a block of its own.
fn is_large(size: usize, align: usize) -> bool {
    cfg!(target_os = "linux") && size >= LARGE && align <= HUGE
}

/// True if large memory at `start` is a block, false if it is a mapped file.
fn is_block(start: usize) -> bool {
    start.is_multiple_of(HUGE)
}

#[expect(unsafe_code, reason = "an allocator hands out memory")]
// SAFETY: a large block is mapped for one request alone until it is freed. It is never smaller than the request, as
// `block_size` is no smaller than its argument, and is aligned to `HUGE`. The allocator and the size of a block follow from
// its layout, which `alloc`, `dealloc` and `realloc` all get, and for mapped files from their address too. No method
// allocates or panics.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout.size(), layout.align()) {
            self.allocate(layout.size()).0
        } else {
            // SAFETY: the contract of the system's allocator is the same.
            unsafe { System.alloc(layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout.size(), layout.align()) {
            // SAFETY: the contract of the system's allocator is the same.
            return unsafe { System.alloc_zeroed(layout) };
        }
        let (start, fresh) = self.allocate(layout.size());
        if !fresh && !start.is_null() {
            // SAFETY: the block has at least this many bytes and belongs to this request.
            unsafe { start.write_bytes(0, layout.size()) };
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if is_large(layout.size(), layout.align()) {
            self.free(start, layout.size());
        } else {
            // SAFETY: small memory came from the system's allocator.
            unsafe { System.dealloc(start, layout) }
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let in_block = |size| is_large(size, layout.align());
        match (in_block(layout.size()), in_block(size)) {
            // SAFETY: small memory came from the system's allocator and stays there.
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

    /// Maps `bytes` of `file` from `offset` on, at an address that is no multiple of `HUGE`. Writes stay in this process.
    pub(crate) fn map_file(file: &File, offset: u64, bytes: usize) -> Option<usize> {
        let page = page_size();
        let within = usize::try_from(offset % page as u64).ok()?;
        let from = offset - within as u64;
        let length = within.checked_add(bytes)?.checked_next_multiple_of(page)?;
        let reserve = length.checked_add(2 * HUGE)?;
        let kind = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses touches no other mapping.
        let whole =
            unsafe { libc::mmap(std::ptr::null_mut(), reserve, libc::PROT_NONE, kind | libc::MAP_ANONYMOUS, -1, 0) };
        if whole == libc::MAP_FAILED {
            return None;
        }
        let begin = whole.expose_provenance();
        // The offset within a huge page is that of the file, so that runs of pages are contiguous in both, but is never 0.
        let into = usize::try_from(from % HUGE as u64).ok()?;
        let base = begin.next_multiple_of(HUGE) + if into + within == 0 { page } else { into };
        let (access, at) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::with_exposed_provenance_mut(base));
        let from = libc::off_t::try_from(from).ok();
        // SAFETY: the range is within the reservation, which is unused and is replaced here: `base` is less than two huge
        // pages behind `begin`.
        let made = from.is_some_and(|from| unsafe {
            libc::mmap(at, length, access, kind | libc::MAP_FIXED, file.as_raw_fd(), from) == at
        });
        if !made {
            unmap(begin, reserve);
            return None;
        }
        unmap(begin, base - begin);
        unmap(base + length, begin + reserve - (base + length));
        Some(base + within)
    }

    /// Unmaps the file that `map_file` mapped.
    pub(crate) fn unmap_file(start: usize, bytes: usize) {
        let (base, length) = whole_pages(start, bytes);
        unmap(base, length);
    }

    pub(crate) fn populate(start: usize, bytes: usize) -> io::Result<()> {
        let (base, length) = whole_pages(start, bytes);
        let advise = |advice| {
            // SAFETY: reading ahead changes no contents.
            match unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(base), length, advice) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let Err(error) = advise(libc::MADV_POPULATE_READ) else { return Ok(()) };
        match error.raw_os_error() {
            Some(libc::EFAULT | libc::EIO | libc::EHWPOISON) => Err(error),
            // Kernels before 5.14 lack `MADV_POPULATE_READ`.
            _ => advise(libc::MADV_WILLNEED).or(Ok(())),
        }
    }

    /// The start and length of the pages that hold some memory.
    fn whole_pages(start: usize, bytes: usize) -> (usize, usize) {
        let page = page_size();
        let within = start % page;
        (start - within, (within + bytes).next_multiple_of(page))
    }

    fn page_size() -> usize {
        // SAFETY: `sysconf` only returns a constant.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
    }

    /// Maps zeroed pages aligned to `HUGE`, huge ones if the kernel has them. `bytes` is a multiple of the page size.
    pub(crate) fn map(bytes: usize) -> Option<usize> {
        let reserve = bytes.checked_add(HUGE)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address that the kernel chooses touches no other mapping.
        let whole = unsafe { libc::mmap(std::ptr::null_mut(), reserve, access, kind, -1, 0) };
        if whole == libc::MAP_FAILED {
            return None;
        }
        let begin = whole.expose_provenance();
        let start = begin.next_multiple_of(HUGE);
        unmap(begin, start - begin);
        unmap(start + bytes, reserve - bytes - (start - begin));
        if bytes >= HUGE {
            // SAFETY: this is advice about pages that were just mapped; if the kernel ignores it, pages are small.
            unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), bytes, libc::MADV_HUGEPAGE) };
        }
        Some(start)
    }

    /// Unmaps unused pages. The kernel refuses only if a process has too many mappings; then the pages stay.
    pub(crate) fn unmap(start: usize, bytes: usize) {
        if bytes > 0 {
            // SAFETY: the range is within a mapping of `map` or `map_file` that is no longer used.
            unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), bytes) };
        }
    }
}

/// Never reached: no request is large on these systems.
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
