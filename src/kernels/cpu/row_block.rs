//! The packed left operand of the micro-kernels: rows of a fixed stride, filled with a part of the depth.

use std::ops::Range;

use crate::kernels::cpu::element::{Element, as_bytes, as_bytes_mut};
use crate::kernels::cpu::elementwise::widen_slice;
use crate::kernels::cpu::micro::tile::{A_STRIDE, Operands};
use crate::kernels::cpu::prefetch::prefetch;

/// f32 between rows of a block.
pub(crate) const ROW_F32S: usize = A_STRIDE / size_of::<f32>();

/// Rows of operands, [`A_STRIDE`] bytes apart.
pub(crate) struct RowBlock<'a> {
    memory: &'a mut [f32],
    operands: Operands,
}

impl<'a> RowBlock<'a> {
    /// `memory` is `[rows, ROW_F32S]`.
    pub(crate) fn new(memory: &'a mut [f32], operands: Operands) -> Self {
        Self { memory, operands }
    }

    /// Writes `from` to `row`, from number `column` on. Operands of other formats than f32 are copied, so `from` has their
    /// format.
    #[inline]
    pub(crate) fn write<T: Element>(&mut self, row: usize, column: usize, from: &[T]) {
        let row = &mut self.memory[row * ROW_F32S..][..ROW_F32S];
        if self.operands == Operands::F32 {
            return widen_slice(from, &mut row[column..column + from.len()]);
        }
        debug_assert_eq!(size_of::<T>(), self.operands.size(), "operands of another format");
        let start = column * self.operands.size();
        as_bytes_mut(row)[start..start + size_of_val(from)].copy_from_slice(as_bytes(from));
    }

    /// Writes `count` zeros.
    #[inline]
    pub(crate) fn clear(&mut self, row: usize, column: usize, count: usize) {
        let size = self.operands.size();
        let row = &mut self.memory[row * ROW_F32S..][..ROW_F32S];
        as_bytes_mut(row)[column * size..(column + count) * size].fill(self.operands.zero_byte());
    }

    /// The memory of a row.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.memory[row * ROW_F32S..][..ROW_F32S]
    }

    /// The rows from `row` on, as a micro-kernel reads them.
    pub(crate) fn rows_from(&self, row: usize) -> *const u8 {
        self.memory[row * ROW_F32S..].as_ptr().cast()
    }
}

/// The left operand of a product.
pub(crate) trait LeftOperand: Sync {
    /// Writes `depth` of rows `rows` to the first rows of `block`.
    fn pack(&self, rows: Range<usize>, depth: Range<usize>, block: &mut RowBlock);
}

/// A matrix `[rows, depth]`.
pub(crate) struct Dense<'a, T> {
    pub(crate) numbers: &'a [T],
    pub(crate) depth: usize,
}

impl<T: Element> LeftOperand for Dense<'_, T> {
    fn pack(&self, rows: Range<usize>, depth: Range<usize>, block: &mut RowBlock) {
        /// Rows that are prefetched while one is copied: they are too far apart for the processor to predict.
        const ROWS_AHEAD: usize = 6;
        for (i, row) in rows.enumerate() {
            let start = row * self.depth;
            let ahead = self.numbers.as_ptr().wrapping_add(start + ROWS_AHEAD * self.depth + depth.start);
            prefetch(ahead.cast(), depth.len() * size_of::<T>());
            block.write(i, 0, &self.numbers[start + depth.start..start + depth.end]);
        }
    }
}
