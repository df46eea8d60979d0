//! Weights as the micro-kernels read them: panels of 32 outputs, the depth down a panel, laid once when a layer is made.
//! One layout serves every instruction set: what differs is only how numbers of one dtype stand beside each other.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

use candle_core::{DType, Result, Tensor};
use half::f16;

use super::element::{Element, Held, Numbers};
use super::micro::{Operands, PANEL};
use super::pool::for_each;
use super::simd;

/// The depth of a panel is filled up with zeros to a multiple of this: what the widest micro-kernel takes at once.
const GRAIN: usize = 32;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Memory that begins with a cache line.
#[derive(Debug)]
pub(super) struct Aligned {
    start: NonNull<u8>,
    bytes: usize,
}

#[expect(unsafe_code, reason = "the memory belongs to the value alone")]
// SAFETY: `Aligned` owns its memory, as a `Vec` does.
unsafe impl Send for Aligned {}
#[expect(unsafe_code, reason = "the memory belongs to the value alone")]
// SAFETY: shared references only make pointers; whoever writes through one answers for it.
unsafe impl Sync for Aligned {}

impl Aligned {
    #[expect(unsafe_code, reason = "an alignment that `Vec` cannot ask for")]
    pub(super) fn zeros(bytes: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), LINE) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout is not of size 0.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { start, bytes }
    }

    pub(super) fn at(&self, byte: usize) -> *mut u8 {
        debug_assert!(byte <= self.bytes, "{byte} of {}", self.bytes);
        self.start.as_ptr().wrapping_add(byte)
    }

    /// Grows to `bytes`; what was there is lost.
    pub(super) fn at_least(&mut self, bytes: usize) -> *mut u8 {
        if self.bytes < bytes {
            *self = Self::zeros(bytes);
        }
        self.start.as_ptr()
    }
}

impl Default for Aligned {
    fn default() -> Self {
        Self::zeros(0)
    }
}

impl Drop for Aligned {
    #[expect(unsafe_code, reason = "gives back what `zeros` took")]
    fn drop(&mut self) {
        if let Ok(layout) = Layout::from_size_align(self.bytes.max(1), LINE) {
            // SAFETY: allocated by `zeros` with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// How the numbers of a panel stand: `[depth, 32]`, for bf16 `[depth/2, 32, 2]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    F32,
    F16,
    Bf16,
}

impl Stored {
    const fn size(self) -> usize {
        if matches!(self, Self::F32) { 4 } else { 2 }
    }
}

/// The weights of a linear layer or convolution.
#[derive(Debug)]
pub(in crate::kernels) struct Packed {
    memory: Aligned,
    stored: Stored,
    outputs: usize,
    depth: usize,
    /// Numbers down a panel.
    padded: usize,
}

impl Packed {
    /// `weight` is `[O, C, ..]` with any axes behind; the depth is those axes, then `C`.
    pub(in crate::kernels) fn new(weight: &Tensor) -> Result<Self> {
        let weight = match weight.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => weight.contiguous()?,
            _ => weight.to_dtype(DType::F32)?.contiguous()?,
        };
        let outputs = weight.dim(0)?;
        let channels = weight.dim(1)?;
        let taps = weight.dims()[2..].iter().product();
        let held = Held::new(&weight);
        Ok(match held.numbers()? {
            Numbers::F32(from) => Self::lay(from, Stored::F32, (outputs, channels, taps)),
            Numbers::F16(from) => Self::lay(from, Stored::F16, (outputs, channels, taps)),
            Numbers::Bf16(from) => Self::lay(from, Stored::Bf16, (outputs, channels, taps)),
        })
    }

    #[expect(unsafe_code, reason = "panels are written by several threads")]
    fn lay<T: Element>(from: &[T], stored: Stored, (outputs, channels, taps): (usize, usize, usize)) -> Self {
        /// Numbers of an output that are taken before the next output's: a few cache lines.
        const RUN: usize = 64;
        let depth = channels * taps;
        let padded = depth.next_multiple_of(GRAIN);
        let panels = outputs.div_ceil(PANEL);
        let memory = Aligned::zeros(panels * padded * PANEL * stored.size());
        for_each(panels, outputs * depth, |panel| {
            // SAFETY: every panel is written by one task, within the memory.
            let to = unsafe {
                std::slice::from_raw_parts_mut(
                    memory.at(panel * padded * PANEL * stored.size()).cast::<T>(),
                    padded * PANEL,
                )
            };
            let first = panel * PANEL;
            let lines = PANEL.min(outputs - first);
            // One tap is the plain case; otherwise a run is one channel's taps after the other's.
            let run = if taps == 1 { RUN } else { taps * (RUN / taps).max(1) };
            for start in (0..depth).step_by(run) {
                for n in 0..lines {
                    let line = &from[(first + n) * depth + start..(first + n) * depth + (start + run).min(depth)];
                    for (i, number) in line.iter().enumerate() {
                        let k = if taps == 1 { start + i } else { (i % taps) * channels + start / taps + i / taps };
                        let at = match stored {
                            Stored::Bf16 => ((k / 2) * PANEL + n) * 2 + k % 2,
                            Stored::F32 | Stored::F16 => k * PANEL + n,
                        };
                        to[at] = *number;
                    }
                }
            }
        });
        Self { memory, stored, outputs, depth, padded }
    }

    pub(in crate::kernels) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(in crate::kernels) fn depth(&self) -> usize {
        self.depth
    }

    /// Whether bf16 operands can be multiplied as they stand.
    pub(super) fn is_bf16(&self) -> bool {
        self.stored == Stored::Bf16
    }

    /// Where panel `panel` stands from number `depth` of the depth on, a multiple of 32.
    pub(super) fn start(&self, panel: usize, depth: usize) -> *const u8 {
        self.memory.at((panel * self.padded + depth) * PANEL * self.stored.size())
    }

    /// Bytes that `depth` numbers of the depth take in a panel.
    pub(super) fn bytes(&self, depth: usize) -> usize {
        depth * PANEL * self.stored.size()
    }

    /// Bytes between a panel and the one `panels` after it.
    pub(super) fn between(&self, panels: usize) -> usize {
        panels * self.bytes(self.padded)
    }

    /// Panel `panel` between `depth`, which begins at a multiple of 32, for a micro-kernel of `operands`: where it
    /// stands, or widened into `scratch`.
    #[expect(unsafe_code, reason = "a panel seen as what it was stored as")]
    pub(super) fn panel(
        &self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &mut Aligned,
    ) -> *const u8 {
        let start = self.start(panel, depth.start);
        let count = depth.len().next_multiple_of(2) * PANEL;
        match (operands, self.stored) {
            (Operands::F32, Stored::F32) | (Operands::Bf16, _) => start,
            (Operands::F32, narrow) => {
                let to = scratch.at_least(count * 4).cast::<f32>();
                // SAFETY: a panel is filled up to a multiple of 32, so `count` numbers are there; `scratch` has as many.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(to, count);
                    match narrow {
                        Stored::Bf16 => {
                            simd::widen_pairs(std::slice::from_raw_parts(start.cast::<u32>(), count / 2), to);
                        }
                        _ => simd::widen_slice(std::slice::from_raw_parts(start.cast::<f16>(), count), to),
                    }
                }
                to.cast()
            }
        }
    }
}
