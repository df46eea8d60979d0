//! Weights as the micro-kernels read them: panels of 32 outputs, the depth down a panel. Those of convolutions, INT8 ones
//! and small ones of plain numbers are laid once, when a layer is made; the rest stay as they are stored, and a panel of
//! them is made when a product comes to it (`unpacked.rs`). One layout serves every instruction set: what differs is only how numbers of one
//! dtype stand beside each other.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

use candle_core::{DType, Result, Tensor, bail};
use half::f16;

use crate::kernels::cpu::element::{Element, Held, Numbers};
use crate::kernels::cpu::micro::{Operands, PANEL};
use crate::kernels::cpu::parallel::{Shared, for_each};
use crate::kernels::cpu::quantize::{Scale, greatest};
use crate::kernels::cpu::simd;
use crate::kernels::cpu::streaming_pack::Rows;
use crate::kernels::{Coding, StoredWeight};

/// The depth of a panel is filled up with zeros to a multiple of this: what the widest micro-kernel takes at once.
const GRAIN: usize = 32;
/// Likewise of a panel of bytes.
const BYTE_GRAIN: usize = 64;
/// The deepest weights that are quantised: sums of products of bytes stay within i32.
const MAX_BYTE_DEPTH: usize = i32::MAX as usize / (127 * 127);
/// Numbers of an output that are taken before the next output's: a few cache lines.
const RUN: usize = 64;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Memory that begins with a cache line.
#[derive(Debug)]
pub(crate) struct Aligned {
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
    pub(crate) fn zeros(bytes: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), LINE) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout is not of size 0.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { start, bytes }
    }

    /// Memory that must be written before it is read.
    #[expect(unsafe_code, reason = "an alignment that `Vec` cannot ask for")]
    pub(crate) fn unwritten(bytes: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), LINE) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout is not of size 0.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        Self { start, bytes }
    }

    pub(crate) fn at(&self, byte: usize) -> *mut u8 {
        debug_assert!(byte <= self.bytes, "{byte} of {}", self.bytes);
        self.start.as_ptr().wrapping_add(byte)
    }

    /// Grows to `bytes`; what was there is lost.
    pub(crate) fn at_least(&mut self, bytes: usize) -> *mut u8 {
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
struct Quantized {
    /// A weight is its byte times this.
    scales: Vec<f32>,
    /// 128 times the sum of the bytes: how much too great sums of unsigned bytes are.
    offsets: Vec<i32>,
}

/// The weights of a linear layer or convolution.
#[derive(Debug)]
pub(crate) struct Packed {
    /// As they are stored; nothing where they were laid beforehand.
    kept: Option<Kept>,
    /// Where nothing is kept.
    laid: Option<Laid>,
    outputs: usize,
    channels: usize,
    taps: usize,
}

/// Weights as they are stored.
#[derive(Debug)]
struct Kept {
    /// `[O, C, ..]`, contiguous, or the bytes of their blocks.
    tensor: Tensor,
    coding: Coding,
    /// What they are rounded to before they are used; f32 where they are not.
    rounded: DType,
    /// Times which they count.
    scale: f32,
}

/// Panels.
#[derive(Debug)]
pub(crate) struct Laid {
    memory: Aligned,
    stored: Stored,
    /// Numbers down a panel.
    padded: usize,
    /// Empty where the weights are no bytes.
    quantized: Quantized,
}

impl Packed {
    /// `weight` is `[O, C, ..]` with any axes behind; the depth is those axes, then `C`. `compute` is the dtype in which the
    /// network computes, `by_filters` whether weights of several taps will be read in the order of the file.
    pub(crate) fn new(weight: &StoredWeight, compute: DType, by_filters: bool) -> Result<Self> {
        let &[outputs, channels, ref taps @ ..] = weight.dims() else {
            bail!("weights have outputs and inputs, and these are {:?}", weight.dims());
        };
        let (taps, coding) = (taps.iter().product(), weight.coding());
        let packed = |kept, laid| Self { kept, laid, outputs, channels, taps };
        // What is not plain numbers grows where it is laid, however small it is.
        let stays = coding.dtype().is_none() || weight.bytes() >= crate::allocator::LARGE;
        let read_as_stored = by_filters || (taps == 1 && stays);
        // Blocks are read where every line begins with a part of one.
        if read_as_stored && (channels * taps).is_multiple_of(coding.grain()) {
            let (tensor, rounded) = (weight.tensor().contiguous()?, coding.rounding(compute));
            let kept = Kept { tensor, coding, rounded, scale: weight.scale() };
            return Ok(packed(Some(kept), None));
        }
        let numbers = weight.numbers(coding.widened(compute))?.contiguous()?;
        Ok(packed(None, Some(Laid::of(&numbers, (outputs, channels, taps))?)))
    }

    /// As [`Self::new`], the weights of each output rounded to 127 steps either side of zero, the greatest of them
    /// exactly. Weights too deep for that, or without any depth, are laid as they are.
    pub(crate) fn int8(weight: &Tensor) -> Result<Self> {
        let depth: usize = weight.dims()[1..].iter().product();
        if !(1..=MAX_BYTE_DEPTH).contains(&depth) {
            return Self::new(&StoredWeight::of(weight.clone())?, weight.dtype(), false);
        }
        let weight = match weight.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => weight.contiguous()?,
            _ => weight.to_dtype(DType::F32)?.contiguous()?,
        };
        let (outputs, channels, taps) = (weight.dim(0)?, weight.dim(1)?, weight.dims()[2..].iter().product());
        let (held, size) = (Held::new(&weight), (outputs, channels, taps));
        let laid = match held.numbers()? {
            Numbers::F32(from) => Laid::lay_bytes(from, size),
            Numbers::F16(from) => Laid::lay_bytes(from, size),
            Numbers::Bf16(from) => Laid::lay_bytes(from, size),
        };
        Ok(Self { kept: None, laid: Some(laid), outputs, channels, taps })
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        let kept = self.kept.as_ref().map_or(0, |kept| kept.tensor.elem_count() * kept.tensor.dtype().size_in_bytes());
        kept + self.laid.as_ref().map_or(0, Laid::bytes)
    }

    /// The weights as they are stored, held for reading, where they were not laid beforehand.
    pub(crate) fn held(&self) -> Option<Held<'_>> {
        self.kept.as_ref().map(|kept| Held::new(&kept.tensor))
    }

    /// What [`Self::held`] holds.
    pub(crate) fn rows<'a>(&self, held: &'a Held<'a>) -> Result<Option<Rows<'a>>> {
        let Some(kept) = &self.kept else { return Ok(None) };
        let (coding, rounded, scale) = (kept.coding, kept.rounded, kept.scale);
        Ok(Some(Rows { bytes: held.bytes()?, coding, rounded, scale, outputs: self.outputs, depth: self.depth() }))
    }

    /// The panels, where they were laid beforehand.
    pub(crate) fn laid(&self) -> Option<&Laid> {
        self.laid.as_ref()
    }

    /// Panels of what is kept, for one product.
    pub(crate) fn lay(&self) -> Result<Laid> {
        let Some(kept) = &self.kept else { bail!("weights that are neither laid nor kept") };
        let shape = [self.outputs, self.channels, self.taps];
        let weight = StoredWeight::new(kept.tensor.clone(), kept.coding, kept.scale, &shape)?;
        let numbers = weight.numbers(kept.coding.widened(kept.rounded))?;
        Laid::of(&numbers, (self.outputs, self.channels, self.taps))
    }

    /// Whether a product reads the weights as they are stored, where they are kept so.
    pub(crate) fn is_flat(&self) -> bool {
        self.taps == 1
    }

    /// Whether the weights are bytes, for activations that are bytes.
    pub(crate) fn is_int8(&self) -> bool {
        self.kept.is_none() && self.laid.as_ref().is_some_and(|laid| laid.stored == Stored::Int8)
    }

    /// Scales and offsets of a panel of bytes.
    pub(crate) fn quantized(&self, panel: usize) -> Option<(&[f32; PANEL], &[i32; PANEL])> {
        let quantized = &self.laid.as_ref()?.quantized;
        let scales = quantized.scales.as_chunks().0.get(panel)?;
        Some((scales, quantized.offsets.as_chunks().0.get(panel)?))
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn depth(&self) -> usize {
        self.channels * self.taps
    }

    /// Whether bf16 operands can be multiplied: the weights are, or are rounded to, such numbers.
    pub(crate) fn is_bf16(&self) -> bool {
        match &self.kept {
            Some(kept) if kept.rounded == DType::F32 => kept.coding == Coding::Bf16,
            Some(kept) => kept.rounded == DType::BF16,
            None => self.laid.as_ref().is_some_and(|laid| laid.stored == Stored::Bf16),
        }
    }
}

impl Laid {
    /// `weight` is `[outputs, channels, ..]`, contiguous.
    fn of(weight: &Tensor, size: (usize, usize, usize)) -> Result<Self> {
        let held = Held::new(weight);
        Ok(match held.numbers()? {
            Numbers::F32(from) => Self::lay(from, Stored::F32, size),
            Numbers::F16(from) => Self::lay(from, Stored::F16, size),
            Numbers::Bf16(from) => Self::lay(from, Stored::Bf16, size),
        })
    }

    #[expect(unsafe_code, reason = "panels are written by several threads")]
    fn lay_bytes<T: Element>(from: &[T], (outputs, channels, taps): (usize, usize, usize)) -> Self {
        let depth = channels * taps;
        let padded = depth.next_multiple_of(BYTE_GRAIN);
        let panels = outputs.div_ceil(PANEL);
        let memory = Aligned::zeros(panels * padded * PANEL);
        let mut quantized = Quantized { scales: vec![0.0; panels * PANEL], offsets: vec![0; panels * PANEL] };
        let (all_scales, all_offsets) = (Shared::new(&mut quantized.scales), Shared::new(&mut quantized.offsets));
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
        Self { memory, stored: Stored::Int8, padded, quantized }
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
        Self { memory, stored, padded, quantized: Quantized::default() }
    }

    fn bytes(&self) -> usize {
        self.memory.bytes + self.quantized.scales.len() * 4 + self.quantized.offsets.len() * 4
    }

    /// Where panel `panel` stands from number `depth` of the depth on, a multiple of 32.
    pub(crate) fn start(&self, panel: usize, depth: usize) -> *const u8 {
        self.memory.at((panel * self.padded + depth) * PANEL * self.stored.size())
    }

    /// Bytes that `depth` numbers of the depth take in a panel.
    pub(crate) fn stretch(&self, depth: usize) -> usize {
        depth * PANEL * self.stored.size()
    }

    /// Panel `panel` between `depth`, which begins at a multiple of 32, for a micro-kernel of `operands`: where it
    /// stands, or widened into `scratch`.
    #[expect(unsafe_code, reason = "a panel seen as what it was stored as")]
    pub(crate) fn panel(
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
