//! The operands of a micro-kernel: a tile of sums is a few rows of the left operand times one panel of weights.

/// Outputs of a panel of weights.
pub(crate) const PANEL: usize = 32;
/// Bytes of a row that one call sums over, at most.
pub(crate) const A_BYTES: usize = 1024;
/// Bytes between rows of a block of left operands. The stride is fixed, so that a row is a displacement, and an odd number
/// of cache lines, so that the rows of a tile map to different cache sets.
pub(crate) const A_STRIDE: usize = A_BYTES + 64;

/// One tile. Its operands do not overlap.
pub(crate) struct TileCall {
    /// `rows` rows, [`A_STRIDE`] apart, each of `depth` numbers.
    pub(crate) a: *const u8,
    /// The panel from the first number of the depth on: f32 `[depth, 32]`, bf16 `[depth/2, 32, 2]`, i8
    /// `[depth/4, 32, 4]`.
    pub(crate) b: *const u8,
    /// A multiple of the micro-kernel's `depth_multiple`; a row of `a` takes at most [`A_BYTES`].
    pub(crate) depth: usize,
    /// `[rows, 32]`: f32, or i32 for i8. The memory holds as many rows as the micro-kernel computes at once.
    pub(crate) c: *mut f32,
    pub(crate) rows: usize,
    /// Adds to the sums in `c`, which are not read otherwise.
    pub(crate) add: bool,
}

/// The number formats that a micro-kernel multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operands {
    F32,
    Bf16,
    /// Signed bytes.
    I8,
    /// Signed bytes with 128 added on the left, signed bytes on the right: each sum exceeds the signed one by 128 times the
    /// sum of the weights.
    U8,
}

impl Operands {
    pub(crate) const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// Every byte of a zero in the left operand.
    pub(crate) const fn zero_byte(self) -> u8 {
        if matches!(self, Self::U8) { 128 } else { 0 }
    }
}

/// Calls `$rows::<R>` for the number of rows of `$call`, which is one of those listed.
macro_rules! by_rows {
    ($call:ident, $rows:ident: $($count:literal)*) => {
        match $call.rows {
            $($count => $rows::<$count>($call),)*
            _ => {}
        }
    };
}
pub(crate) use by_rows;
