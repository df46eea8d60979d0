//! Hints that bring memory to the second-level cache before a kernel reads it.

use crate::kernels::cpu::aligned::CACHE_LINE;

/// Prefetches `bytes` bytes to the second-level cache. Any address is allowed.
#[inline]
pub(crate) fn prefetch(at: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(CACHE_LINE) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        #[expect(unsafe_code, reason = "a hint to the processor")]
        // SAFETY: a prefetch never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
}

/// Rows of cache lines that will be read, prefetched in equal parts.
pub(crate) struct PrefetchRows {
    at: *const u8,
    stride: usize,
    rows: usize,
    lines_per_row: usize,
    /// Lines of the first row that have been prefetched.
    line: usize,
    lines_per_part: usize,
}

impl PrefetchRows {
    /// `rows` rows of `lines_per_row` cache lines, `stride` bytes apart, in `parts` parts.
    pub(crate) fn new(at: *const u8, stride: usize, rows: usize, lines_per_row: usize, parts: usize) -> Self {
        Self { at, stride, rows, lines_per_row, line: 0, lines_per_part: (rows * lines_per_row).div_ceil(parts) }
    }

    pub(crate) fn none() -> Self {
        Self::new(std::ptr::null(), 0, 0, 0, 1)
    }

    /// Prefetches the next part.
    #[inline]
    pub(crate) fn next_part(&mut self) {
        let mut left = self.lines_per_part;
        while self.rows > 0 && left > 0 {
            let lines = (self.lines_per_row - self.line).min(left);
            prefetch(self.at.wrapping_add(self.line * CACHE_LINE), lines * CACHE_LINE);
            (self.line, left) = (self.line + lines, left - lines);
            if self.line == self.lines_per_row {
                (self.at, self.line, self.rows) = (self.at.wrapping_add(self.stride), 0, self.rows - 1);
            }
        }
    }
}
