//! The scratch memory that each thread reuses from call to call.

use std::cell::RefCell;

use crate::kernels::cpu::aligned::AlignedBuffer;
use crate::kernels::cpu::softmax::SoftmaxState;

/// Blocks of one thread. Each grows to what its largest use needed, a few MiB.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Rows of the left operand.
    pub(crate) rows: AlignedBuffer,
    /// A panel of weights.
    pub(crate) panel: AlignedBuffer,
    /// Softmax powers, or the results of Winograd tiles.
    pub(crate) values: AlignedBuffer,
    pub(crate) sums: AlignedBuffer,
    pub(crate) scores: AlignedBuffer,
    pub(crate) softmax: Vec<SoftmaxState>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends this thread's blocks. `work` must not start parallel work of its own: a stolen task would borrow them again.
pub(crate) fn with_scratch<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(work)
}
