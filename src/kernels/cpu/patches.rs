//! The left operand of a convolution: for each output position the input numbers under the kernel, gathered block by
//! block and never as a whole.

use std::ops::Range;

use super::element::Element;
use super::product::Rows;
use super::simd;
use crate::kernels::ConvShape;

/// Rows are output positions `(b, y, x)`; the depth is `(ky, kx, c)`.
pub(super) struct Patches<'a, T> {
    /// `[B, H, W, C]`
    pub(super) numbers: &'a [T],
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
    pub(super) shape: ConvShape,
}

impl<T: Element> Rows for Patches<'_, T> {
    fn direct(&self) -> Option<&[f32]> {
        None
    }

    fn fill(&self, rows: Range<usize>, depth: Range<usize>, block: &mut [f32]) {
        if depth.is_empty() {
            return;
        }
        let ConvShape { inputs: channels, kernel, stride, padding, .. } = self.shape;
        let span = kernel * channels; // one row of the kernel: adjacent in the input too
        for (row, line) in rows.zip(block.chunks_exact_mut(depth.len())) {
            let (x, rest) = (row % self.out_width, row / self.out_width);
            let (y, sample) = (rest % self.out_height, rest / self.out_height);
            // Columns of the kernel that lie on the input: `low..high`.
            let low = padding.left.saturating_sub(x * stride).min(kernel);
            let high = (self.width + padding.left).saturating_sub(x * stride).clamp(low, kernel);
            let mut rest = line;
            for ky in depth.start / span..=(depth.end - 1) / span {
                let from = depth.start.max(ky * span) - ky * span;
                let to = depth.end.min((ky + 1) * span) - ky * span;
                let (segment, later) = rest.split_at_mut(to - from);
                rest = later;
                let inside = (y * stride + ky).checked_sub(padding.top).filter(|row| *row < self.height);
                let Some(input_row) = inside.filter(|_| low < high) else {
                    segment.fill(0.0);
                    continue;
                };
                let first = (low * channels).clamp(from, to);
                let last = (high * channels).clamp(first, to);
                segment[..first - from].fill(0.0);
                segment[last - from..].fill(0.0);
                if first < last {
                    // Column `x · stride + kx - left`, which is on the input for `kx` in `low..high`.
                    let base = (sample * self.height + input_row) * self.width * channels;
                    let start = base + x * stride * channels + first - padding.left * channels;
                    simd::widen_slice(
                        &self.numbers[start..start + (last - first)],
                        &mut segment[first - from..last - from],
                    );
                }
            }
        }
    }
}
