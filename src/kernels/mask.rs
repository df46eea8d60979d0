//! Masks of attention.

/// Keys that a query may attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    None,
    /// Key `j` only where `j <= i`.
    Causal,
}
