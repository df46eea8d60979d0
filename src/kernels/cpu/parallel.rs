//! How work is spread over threads, and the memory each thread keeps for its blocks.

use std::cell::RefCell;

use rayon::prelude::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator, ParallelSliceMut};

use crate::kernels::cpu::attention::Mark;
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::packed::Aligned;

/// Elementary operations below which a second thread costs more than it brings.
const WORTH_SHARING: usize = 1 << 17;

/// Numbers in a block of elementwise work.
const BLOCK: usize = 1 << 15;

/// Blocks that a thread reuses from call to call; each grows to what its largest use needed, a few MiB.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) rows: Aligned,
    pub(crate) panel: Aligned,
    pub(crate) values: Aligned,
    pub(crate) sums: Aligned,
    pub(crate) scores: Aligned,
    pub(crate) marks: Vec<Mark>,
}

/// The memory of a result, of which every task writes its own part.
pub(crate) struct Shared<T>(*mut T);

#[expect(unsafe_code, reason = "parts of one result are written by several threads")]
// SAFETY: `at` only makes pointers; whoever writes through one answers for the parts being disjoint.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(all: &mut [T]) -> Self {
        Self(all.as_mut_ptr())
    }

    pub(crate) fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends this thread's blocks. `work` must not start parallel work of its own: a stolen task would find them lent.
pub(crate) fn with_scratch<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(work)
}

pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `task` for `0..count`; `operations` is the size of it all.
pub(crate) fn for_each(count: usize, operations: usize, task: impl Fn(usize) + Sync + Send) {
    if count < 2 || operations < WORTH_SHARING {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Rows in a block of elementwise work on rows of `length` numbers.
pub(crate) fn rows_per_block(length: usize) -> usize {
    (BLOCK / length.max(1)).max(1)
}

/// Makes `rows` rows of `length` numbers: `fill` gets the number of its first row and a run of whole rows, and writes all of
/// them.
pub(crate) fn make_rows<T: Element>(
    rows: usize,
    length: usize,
    fill: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    let mut out = T::unwritten(rows * length);
    let block = rows_per_block(length);
    let size = (block * length).max(1);
    if out.len() < WORTH_SHARING / 4 {
        out.chunks_mut(size).enumerate().for_each(|(i, run)| fill(i * block, run));
    } else {
        out.par_chunks_mut(size).enumerate().for_each(|(i, run)| fill(i * block, run));
    }
    out
}
