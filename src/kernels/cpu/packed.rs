//! Weights as the micro-kernels read them: panels of 32 outputs, the depth down a panel. Those of convolutions, INT8 ones
//! and small ones are laid once, when a layer is made; the rest stay as they are stored, and a panel of them is made when
//! a product comes to it (`unpacked.rs`). One layout serves every instruction set: what differs is only how numbers of one
//! dtype stand beside each other.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

use candle_core::{DType, Result, Tensor};
use half::f16;

use super::element::{Element, Held, Numbers};
use super::micro::{Operands, PANEL};
use super::pool::{Shared, for_each};
use super::quantise::{Scale, greatest};
use super::{simd, unpacked};

/// The depth of a panel is filled up with zeros to a multiple of this: what the widest micro-kernel takes at once.
const GRAIN: usize = 32;
/// Likewise of a panel of bytes.
const BYTE_GRAIN: usize = 64;
/// The deepest weights that are quantised: sums of products of bytes stay within i32.
const MAX_BYTE_DEPTH: usize = i32::MAX as usize / (127 * 127);
/// Numbers of an output that are taken before the next output's: a few cache lines.
const RUN: usize = 64;

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

    /// Memory that must be written before it is read.
    #[expect(unsafe_code, reason = "an alignment that `Vec` cannot ask for")]
    pub(super) fn unwritten(bytes: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), LINE) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout is not of size 0.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
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

/// How the numbers of a panel stand: `[depth, 32]`, for bf16 `[depth/2, 32, 2]`, for signed bytes `[depth/4, 32, 4]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    F32,
    F16,
    Bf16,
    Int8,
}

impl Stored {
    const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// What makes sums of products with the quantised weights of an output results; one for each output of every panel.
#[derive(Debug, Default)]
struct Quantised {
    /// A weight is its byte times this.
    scales: Vec<f32>,
    /// 128 times the sum of the bytes: how much too great sums of unsigned bytes are.
    offsets: Vec<i32>,
}

/// The weights of a linear layer or convolution.
#[derive(Debug)]
pub(in crate::kernels) struct Packed {
    /// The panels; nothing where there is a `tensor`.
    memory: Aligned,
    /// `[O, I, ..]`, contiguous: the weights as they are stored.
    tensor: Option<Tensor>,
    stored: Stored,
    outputs: usize,
    depth: usize,
    /// Numbers down a panel.
    padded: usize,
    /// Empty where the weights are no bytes.
    quantised: Quantised,
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
        if unpacked::serves(&weight) {
            let stored = match weight.dtype() {
                DType::BF16 => Stored::Bf16,
                DType::F16 => Stored::F16,
                _ => Stored::F32,
            };
            let (memory, quantised) = (Aligned::zeros(0), Quantised::default());
            return Ok(Self { memory, tensor: Some(weight), stored, outputs, depth: channels, padded: 0, quantised });
        }
        let held = Held::new(&weight);
        Ok(match held.numbers()? {
            Numbers::F32(from) => Self::lay(from, Stored::F32, (outputs, channels, taps)),
            Numbers::F16(from) => Self::lay(from, Stored::F16, (outputs, channels, taps)),
            Numbers::Bf16(from) => Self::lay(from, Stored::Bf16, (outputs, channels, taps)),
        })
    }

    /// As [`Self::new`], the weights of each output rounded to 127 steps either side of zero, the greatest of them
    /// exactly. Weights too deep for that, or without any depth, are laid as they are.
    pub(in crate::kernels) fn int8(weight: &Tensor) -> Result<Self> {
        let depth: usize = weight.dims()[1..].iter().product();
        if !(1..=MAX_BYTE_DEPTH).contains(&depth) {
            return Self::new(weight);
        }
        let weight = match weight.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => weight.contiguous()?,
            _ => weight.to_dtype(DType::F32)?.contiguous()?,
        };
        let size = (weight.dim(0)?, weight.dim(1)?, weight.dims()[2..].iter().product());
        let held = Held::new(&weight);
        Ok(match held.numbers()? {
            Numbers::F32(from) => Self::lay_bytes(from, size),
            Numbers::F16(from) => Self::lay_bytes(from, size),
            Numbers::Bf16(from) => Self::lay_bytes(from, size),
        })
    }

    #[expect(unsafe_code, reason = "panels are written by several threads")]
    fn lay_bytes<T: Element>(from: &[T], (outputs, channels, taps): (usize, usize, usize)) -> Self {
        let depth = channels * taps;
        let padded = depth.next_multiple_of(BYTE_GRAIN);
        let panels = outputs.div_ceil(PANEL);
        let memory = Aligned::zeros(panels * padded * PANEL);
        let mut quantised = Quantised { scales: vec![0.0; panels * PANEL], offsets: vec![0; panels * PANEL] };
        let (all_scales, all_offsets) = (Shared::new(&mut quantised.scales), Shared::new(&mut quantised.offsets));
        for_each(panels, outputs * depth, |panel| {
            let first = panel * PANEL;
            // SAFETY: every panel and its scales are written by one task, within their memory.
            let (to, scales, offsets) = unsafe {
                (
                    std::slice::from_raw_parts_mut(memory.at(first * padded), padded * PANEL),
                    std::slice::from_raw_parts_mut(all_scales.at(first), PANEL),
                    std::slice::from_raw_parts_mut(all_offsets.at(first), PANEL),
                )
            };
            let lines = from[first * depth..].chunks_exact(depth).take(PANEL);
            for (n, line) in lines.enumerate() {
                let scale = Scale::new(greatest(line));
                let mut sum = 0;
                // In the order of the memory that is written.
                for tap in 0..taps {
                    let numbers = line.iter().skip(tap).step_by(taps);
                    for (k, number) in (tap * channels..).zip(numbers) {
                        let byte = scale.byte(*number);
                        sum += i32::from(byte);
                        to[((k / 4) * PANEL + n) * 4 + k % 4] = byte as u8;
                    }
                }
                (scales[n], offsets[n]) = (scale.step, sum.wrapping_mul(128));
            }
        });
        Self { memory, tensor: None, stored: Stored::Int8, outputs, depth, padded, quantised }
    }

    #[expect(unsafe_code, reason = "panels are written by several threads")]
    fn lay<T: Element>(from: &[T], stored: Stored, (outputs, channels, taps): (usize, usize, usize)) -> Self {
        let depth = channels * taps;
        let padded = depth.next_multiple_of(GRAIN);
        let panels = outputs.div_ceil(PANEL);
        let memory = Aligned::zeros(panels * padded * PANEL * stored.size());
        // Without depth there is nothing to lay.
        for_each(if depth == 0 { 0 } else { panels }, outputs * depth, |panel| {
            // SAFETY: every panel is written by one task, within the memory.
            let to = unsafe {
                std::slice::from_raw_parts_mut(
                    memory.at(panel * padded * PANEL * stored.size()).cast::<T>(),
                    padded * PANEL,
                )
            };
            let first = panel * PANEL;
            let lines = PANEL.min(outputs - first);
            // A run is some channels, all their taps; it is copied first, as rows a power of two apart share cache sets.
            let some = (RUN / taps).max(2).next_multiple_of(2).min(channels);
            let mut run = vec![T::zero(); PANEL * (some * taps + 2)];
            let stride = some * taps + 2;
            for channel in (0..channels).step_by(some) {
                let some = some.min(channels - channel);
                for (n, line) in run.chunks_exact_mut(stride).take(lines).enumerate() {
                    let start = (first + n) * depth + channel * taps;
                    line[..some * taps].copy_from_slice(&from[start..start + some * taps]);
                }
                for tap in 0..taps {
                    let k = tap * channels + channel;
                    if stored == Stored::Bf16 && k % 2 == 0 && some % 2 == 0 {
                        for pair in 0..some / 2 {
                            let at = (k / 2 + pair) * 2 * PANEL;
                            let line = to[at..at + 2 * lines].chunks_exact_mut(2);
                            for (to, from) in line.zip(run.chunks_exact(stride)) {
                                to[0] = from[2 * pair * taps + tap];
                                to[1] = from[(2 * pair + 1) * taps + tap];
                            }
                        }
                        continue;
                    }
                    for i in 0..some {
                        let k = k + i;
                        for (n, from) in run.chunks_exact(stride).take(lines).enumerate() {
                            let at = match stored {
                                Stored::Bf16 => ((k / 2) * PANEL + n) * 2 + k % 2,
                                Stored::F32 | Stored::F16 | Stored::Int8 => k * PANEL + n,
                            };
                            to[at] = from[i * taps + tap];
                        }
                    }
                }
            }
        });
        Self { memory, tensor: None, stored, outputs, depth, padded, quantised: Quantised::default() }
    }

    /// Bytes of memory.
    pub(in crate::kernels) fn bytes(&self) -> usize {
        let stored = self.tensor.as_ref().map_or(0, |tensor| tensor.elem_count() * self.stored.size());
        self.memory.bytes + stored + self.quantised.scales.len() * 4 + self.quantised.offsets.len() * 4
    }

    /// The weights as they are stored, held for reading, where they were not laid.
    pub(super) fn held(&self) -> Option<Held<'_>> {
        self.tensor.as_ref().map(Held::new)
    }

    /// Whether the weights are bytes, for activations that are bytes.
    pub(super) fn is_int8(&self) -> bool {
        self.stored == Stored::Int8
    }

    /// Scales and offsets of a panel of bytes.
    pub(super) fn quantised(&self, panel: usize) -> Option<(&[f32; PANEL], &[i32; PANEL])> {
        let scales = self.quantised.scales.as_chunks().0.get(panel)?;
        Some((scales, self.quantised.offsets.as_chunks().0.get(panel)?))
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

    /// Of weights that were laid: where panel `panel` stands from number `depth` of the depth on, a multiple of 32.
    pub(super) fn start(&self, panel: usize, depth: usize) -> *const u8 {
        self.memory.at((panel * self.padded + depth) * PANEL * self.stored.size())
    }

    /// Bytes that `depth` numbers of the depth take in a panel.
    pub(super) fn stretch(&self, depth: usize) -> usize {
        depth * PANEL * self.stored.size()
    }

    /// Of weights that were laid: panel `panel` between `depth`, which begins at a multiple of 32, for a micro-kernel of `operands`: where it
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
            (Operands::F32, Stored::F32) | (Operands::Bf16 | Operands::I8 | Operands::U8, _) => start,
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
