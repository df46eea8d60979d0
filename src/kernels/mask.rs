//! Masks of attention.

/// Which keys a query may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    None,
    /// Key `j` only where `j <= i`.
    Causal,
}
