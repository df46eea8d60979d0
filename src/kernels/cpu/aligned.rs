//! Memory aligned to cache lines, for packed panels and for the scratch blocks of the micro-kernels.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use half::{bf16, f16};

use crate::allocator::FromBits;

/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;

#[expect(unsafe_code, reason = "any bits are an integer")]
// SAFETY: any bits are an integer.
unsafe impl FromBits for u32 {}
#[expect(unsafe_code, reason = "any bits are a bf16")]
// SAFETY: any bits are a bf16.
unsafe impl FromBits for bf16 {}
#[expect(unsafe_code, reason = "any bits are an f16")]
// SAFETY: any bits are an f16.
unsafe impl FromBits for f16 {}

/// Zeroed memory that begins at a cache line and can be read as numbers of any type.
#[derive(Debug, Default)]
pub(crate) struct AlignedBuffer(UninitBuffer);

impl AlignedBuffer {
    pub(crate) fn zeros(bytes: usize) -> Self {
        Self(UninitBuffer::allocate(bytes, alloc_zeroed))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.bytes
    }

    #[expect(unsafe_code, reason = "the buffer seen as bytes")]
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the buffer owns as many bytes, which were zeroed when it was made.
        unsafe { std::slice::from_raw_parts(self.0.start(), self.0.bytes) }
    }

    /// The whole buffer as numbers.
    #[expect(unsafe_code, reason = "the buffer seen as numbers")]
    pub(crate) fn as_mut_slice<T: FromBits>(&mut self) -> &mut [T] {
        const { assert!(align_of::<T>() <= CACHE_LINE) }
        // SAFETY: the buffer owns as many bytes, which were zeroed when it was made; any bits are a `T`.
        unsafe { std::slice::from_raw_parts_mut(self.0.start().cast(), self.0.bytes / size_of::<T>()) }
    }

    /// The first `count` numbers. A buffer that is too small is replaced by a zeroed one; the contents are lost.
    pub(crate) fn scratch<T: FromBits>(&mut self, count: usize) -> &mut [T] {
        let bytes = count * size_of::<T>();
        if self.len() < bytes {
            *self = Self::zeros(bytes);
        }
        &mut self.as_mut_slice()[..count]
    }
}

/// Memory that begins at a cache line and must be written before it is read.
#[derive(Debug)]
pub(crate) struct UninitBuffer {
    start: NonNull<u8>,
    bytes: usize,
}

#[expect(unsafe_code, reason = "the memory belongs to the value alone")]
// SAFETY: the buffer owns its memory, as a `Vec` does.
unsafe impl Send for UninitBuffer {}
#[expect(unsafe_code, reason = "the memory belongs to the value alone")]
// SAFETY: a shared reference only reads the memory.
unsafe impl Sync for UninitBuffer {}

impl UninitBuffer {
    pub(crate) fn new(bytes: usize) -> Self {
        Self::allocate(bytes, alloc)
    }

    #[expect(unsafe_code, reason = "`Vec` cannot be aligned like this")]
    fn allocate(bytes: usize, allocate: unsafe fn(Layout) -> *mut u8) -> Self {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), CACHE_LINE) else {
            handle_alloc_error(Layout::new::<u8>())
        };
        // SAFETY: the layout is not of size 0.
        let Some(start) = NonNull::new(unsafe { allocate(layout) }) else { handle_alloc_error(layout) };
        Self { start, bytes }
    }

    fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    #[expect(unsafe_code, reason = "the buffer seen as bytes")]
    pub(crate) fn as_slice(&self) -> &[MaybeUninit<u8>] {
        // SAFETY: the buffer owns as many bytes, and promises nothing about their contents.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.bytes) }
    }

    /// The whole buffer as words.
    #[expect(unsafe_code, reason = "the buffer seen as words")]
    pub(crate) fn as_mut_words(&mut self) -> &mut [MaybeUninit<u32>] {
        // SAFETY: the buffer owns as many bytes, aligned to a cache line, and promises nothing about their contents.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.bytes / size_of::<u32>()) }
    }
}

impl Default for UninitBuffer {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Drop for UninitBuffer {
    #[expect(unsafe_code, reason = "frees what `allocate` took")]
    fn drop(&mut self) {
        if let Ok(layout) = Layout::from_size_align(self.bytes.max(1), CACHE_LINE) {
            // SAFETY: `allocate` took the memory with this layout.
            unsafe { dealloc(self.start(), layout) }
        }
    }
}

/// Words seen as numbers of at most their size.
#[expect(unsafe_code, reason = "uninitialized words seen as numbers")]
pub(crate) fn uninit_numbers<T: FromBits>(words: &mut [MaybeUninit<u32>]) -> &mut [MaybeUninit<T>] {
    const { assert!(align_of::<T>() <= align_of::<u32>() && size_of::<u32>().is_multiple_of(size_of::<T>())) }
    let count = size_of_val(words) / size_of::<T>();
    // SAFETY: the words' memory holds as many numbers, is aligned for them, and promises nothing about its contents.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), count) }
}

/// Initialised numbers as memory to write.
///
/// # Safety
/// Only initialized numbers are written to the slice.
#[expect(unsafe_code, reason = "the caller promises what the type no longer says")]
pub(crate) unsafe fn as_uninit<T>(numbers: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: the layouts are equal, and the caller keeps the numbers initialized.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), numbers.len()) }
}
