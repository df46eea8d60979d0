//! Which layers keep their weights as bytes is said around the load of a network, so that networks need not know of it.

use std::cell::Cell;

/// Judges a layer by its name and the shape of its weight, the outputs first.
pub type Chosen = fn(&str, &[usize]) -> bool;

#[derive(Clone, Copy)]
struct Scope {
    chosen: Chosen,
    saved: usize,
}

thread_local! {
    static SCOPE: Cell<Option<Scope>> = const { Cell::new(None) };
}

/// Ends a scope, also when a load panics.
struct Outer(Option<Scope>);

impl Drop for Outer {
    fn drop(&mut self) {
        SCOPE.set(self.0);
    }
}

/// Runs `load`, within which layers that `chosen` names and that lie on the CPU are kept as INT8. Gives what `load` gave,
/// and by how many bytes these layers are smaller than their weights were.
pub fn quantizing<R>(chosen: Chosen, load: impl FnOnce() -> R) -> (R, usize) {
    let _outer = Outer(SCOPE.replace(Some(Scope { chosen, saved: 0 })));
    let made = load();
    (made, SCOPE.get().map_or(0, |scope| scope.saved))
}

/// Whether the layer shall be kept as INT8.
pub(crate) fn is_chosen(layer: &str, weight: &[usize]) -> bool {
    SCOPE.get().is_some_and(|scope| (scope.chosen)(layer, weight))
}

/// Counts bytes that a layer is smaller by.
pub(crate) fn count(saved: usize) {
    SCOPE.set(SCOPE.get().map(|scope| Scope { saved: scope.saved + saved, ..scope }));
}
