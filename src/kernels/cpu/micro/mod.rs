//! Microkernels: the innermost products, one file per instruction set.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;

/// Bytes between rows of a block of left operands. Fixed, so that rows are displacements; odd in cache lines, so that
/// rows do not share a set.
#[cfg(target_arch = "x86_64")]
pub(super) const A_STRIDE: usize = 1024 + 64;
/// Outputs of a panel of weights.
#[cfg(target_arch = "x86_64")]
pub(super) const PANEL: usize = 32;

/// One micro-tile: `rows` × 32 sums over `depth`.
#[cfg(target_arch = "x86_64")]
pub(super) struct Call {
    pub(super) a: *const u8,
    pub(super) b: *const u8,
    pub(super) depth: usize,
    pub(super) c: *mut f32,
    pub(super) rows: usize,
    pub(super) add: bool,
}
