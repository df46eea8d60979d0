//! Distributes the work of a kernel over threads, and lets tasks write disjoint parts of one result.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use rayon::prelude::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator, ParallelSliceMut};

use crate::kernels::cpu::element::Element;

/// Elementary operations below which a second thread costs more than it saves.
const WORTH_SHARING: usize = 1 << 17;

/// Numbers in a block of elementwise work.
const BLOCK: usize = 1 << 15;

/// The memory of a result `[rows, columns]`, of which every task writes its own tiles.
pub(crate) struct OutputTiles<'a, T> {
    start: *mut MaybeUninit<T>,
    len: usize,
    result: PhantomData<&'a mut [MaybeUninit<T>]>,
}

impl<T> Clone for OutputTiles<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for OutputTiles<'_, T> {}

#[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
// SAFETY: `line` hands out disjoint slices, as the caller of `new` promises.
unsafe impl<T: Send> Sync for OutputTiles<'_, T> {}

impl<'a, T> OutputTiles<'a, T> {
    /// # Safety
    /// Slices that [`Self::line`] returns lie within `result`, and those that exist at the same time do not overlap.
    #[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
    pub(crate) unsafe fn new(result: &'a mut [MaybeUninit<T>]) -> Self {
        Self { start: result.as_mut_ptr(), len: result.len(), result: PhantomData }
    }

    /// `count` numbers of the result from number `start` on.
    #[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
    #[inline(always)]
    pub(crate) fn line(self, start: usize, count: usize) -> &'a mut [MaybeUninit<T>] {
        debug_assert!(start + count <= self.len, "{start} + {count} of {}", self.len);
        // SAFETY: the caller of `new` promises that the slice lies within the result and is disjoint from all others.
        unsafe { std::slice::from_raw_parts_mut(self.start.wrapping_add(start), count) }
    }

    /// The address of number `index`, for prefetching.
    pub(crate) fn address(self, index: usize) -> *const u8 {
        self.start.wrapping_add(index).cast_const().cast()
    }
}

pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `task` for `0..count`; `operations` is the size of all tasks together.
pub(crate) fn for_each(count: usize, operations: usize, task: impl Fn(usize) + Sync + Send) {
    if count < 2 || operations < WORTH_SHARING {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Runs `task` for each of `parts` with its index; `operations` is the size of all tasks together.
pub(crate) fn for_each_part<I: IndexedParallelIterator>(
    parts: I,
    operations: usize,
    task: impl Fn(usize, I::Item) + Sync + Send,
) {
    let per_job = if operations < WORTH_SHARING { parts.len().max(1) } else { 1 };
    parts.enumerate().with_min_len(per_job).with_max_len(per_job).for_each(|(i, part)| task(i, part));
}

/// Rows in a block of elementwise work on rows of `length` numbers.
pub(crate) fn rows_per_block(length: usize) -> usize {
    (BLOCK / length.max(1)).max(1)
}

/// Makes `rows` rows of `length` numbers. `fill` gets a run of whole rows and the index of its first row.
///
/// # Safety
/// `fill` writes every number of the run that it gets.
#[expect(unsafe_code, reason = "results are written to uninitialized memory")]
pub(crate) unsafe fn make_rows<T: Element>(
    rows: usize,
    length: usize,
    fill: impl Fn(usize, &mut [MaybeUninit<T>]) + Sync + Send,
) -> Vec<T> {
    let mut out = Box::new_uninit_slice(rows * length);
    let block = rows_per_block(length);
    let size = (block * length).max(1);
    if out.len() < WORTH_SHARING / 4 {
        out.chunks_mut(size).enumerate().for_each(|(i, run)| fill(i * block, run));
    } else {
        out.par_chunks_mut(size).enumerate().for_each(|(i, run)| fill(i * block, run));
    }
    // SAFETY: the caller promises that every run has been written.
    unsafe { out.assume_init() }.into_vec()
}
