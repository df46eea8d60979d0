//! By how much layers outgrow what a source gives: bytes of blocks or of eight-bit floats, where a kernel needs the
//! numbers themselves. It is counted around the load of a network, so that networks need not know of it.

use std::cell::Cell;

use crate::kernels::stored_weight::StoredWeight;

thread_local! {
    static GROWN: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Ends a scope, also when a load panics.
struct Outer(Option<usize>);

impl Drop for Outer {
    fn drop(&mut self) {
        GROWN.set(self.0);
    }
}

/// Runs `load`. Gives what it gave, and by how many bytes layers on the CPU are larger than the codes of their weights.
pub fn growing<R>(load: impl FnOnce() -> R) -> (R, usize) {
    let _outer = Outer(GROWN.replace(Some(0)));
    let made = load();
    (made, GROWN.get().unwrap_or(0))
}

/// A layer holds `bytes` for `weight`.
pub(crate) fn count(weight: &StoredWeight, bytes: usize) {
    // Panels of plain numbers are as large as these, but for a margin.
    if weight.coding().dtype().is_none() {
        let more = bytes.saturating_sub(weight.bytes());
        GROWN.set(GROWN.get().map(|grown| grown + more));
    }
}
