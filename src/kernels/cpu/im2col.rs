//! The left operand of a convolution: for each output position the input numbers under the kernel. They are gathered block
//! by block; the whole im2col matrix never exists.

use std::ops::Range;

use crate::kernels::conv_shape::ConvShape;
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::row_block::{LeftOperand, RowBlock};

/// Rows are output positions `(b, y, x)`; the depth is `(ky, kx, c)`.
pub(crate) struct Im2col<'a, T> {
    /// `[B, H, W, C]`
    pub(crate) numbers: &'a [T],
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) out_height: usize,
    pub(crate) out_width: usize,
    pub(crate) shape: ConvShape,
}

impl<T: Element> LeftOperand for Im2col<'_, T> {
    fn pack(&self, rows: Range<usize>, depth: Range<usize>, block: &mut RowBlock) {
        if depth.is_empty() {
            return;
        }
        let ConvShape { inputs: channels, kernel, stride, padding, .. } = self.shape;
        let span = kernel * channels; // one row of the kernel, which is contiguous in the input too
        let mut x = rows.start % self.out_width;
        let mut y = rows.start / self.out_width % self.out_height;
        let mut sample = rows.start / (self.out_width * self.out_height);
        for line in 0..rows.len() {
            // Columns `low..high` of the kernel lie on the input.
            let low = padding.left.saturating_sub(x * stride).min(kernel);
            let high = (self.width + padding.left).saturating_sub(x * stride).clamp(low, kernel);
            let mut done = 0;
            for ky in depth.start / span..=(depth.end - 1) / span {
                let from = depth.start.max(ky * span) - ky * span;
                let to = depth.end.min((ky + 1) * span) - ky * span;
                let at = done;
                done += to - from;
                let inside = (y * stride + ky).checked_sub(padding.top).filter(|row| *row < self.height);
                let Some(input_row) = inside.filter(|_| low < high) else {
                    block.clear(line, at, to - from);
                    continue;
                };
                let first = (low * channels).clamp(from, to);
                let last = (high * channels).clamp(first, to);
                if first > from {
                    block.clear(line, at, first - from);
                }
                if last < to {
                    block.clear(line, at + last - from, to - last);
                }
                if first < last {
                    // Column `x · stride + kx - left` is on the input for `kx` in `low..high`.
                    let base = (sample * self.height + input_row) * self.width * channels;
                    let start = base + x * stride * channels + first - padding.left * channels;
                    block.write(line, at + first - from, &self.numbers[start..start + (last - first)]);
                }
            }
            x += 1;
            if x == self.out_width {
                (x, y) = (0, y + 1);
            }
            if y == self.out_height {
                (y, sample) = (0, sample + 1);
            }
        }
    }
}
