//! Panels of weights in the order in which the micro-kernels read them: 32 outputs side by side, the depth down the panel.
//! All instruction sets read one layout; formats differ only in how neighbouring numbers of the depth are grouped.

use std::ops::Range;

use candle_core::{Result, Tensor};
use half::f16;
use rayon::prelude::{IndexedParallelIterator, ParallelSliceMut};

use crate::kernels::cpu::aligned::{AlignedBuffer, CACHE_LINE};
use crate::kernels::cpu::element::{Element, as_bytes};
use crate::kernels::cpu::elementwise::{widen_pairs, widen_slice};
use crate::kernels::cpu::micro::tile::{Operands, PANEL};
use crate::kernels::cpu::parallel::for_each_part;
use crate::kernels::cpu::prefetch::PrefetchRows;
use crate::kernels::cpu::quantize::{QuantScale, max_magnitude_bits};
use crate::kernels::cpu::tensor_guard::{TensorGuard, TypedSlice};

/// The depth of a panel is padded with zeros to a multiple of this, the most that a micro-kernel takes at once.
const DEPTH_MULTIPLE: usize = 32;
/// The same for a panel of bytes.
const INT8_DEPTH_MULTIPLE: usize = 64;
/// Numbers that are read of one output before the next output: a few cache lines.
const RUN: usize = 64;

/// The number format and order of a panel: `[depth, 32]`, for bf16 `[depth/2, 32, 2]`, for signed bytes `[depth/4, 32, 4]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PanelFormat {
    F32,
    F16,
    Bf16,
    Int8,
}

impl PanelFormat {
    const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// The parameters that convert i32 sums to results, for each output of every panel.
#[derive(Debug, Default)]
struct Dequantization {
    /// A weight is its byte times the scale.
    scales: Vec<f32>,
    /// 128 times the sum of the bytes, which sums of unsigned bytes exceed the signed ones by.
    offsets: Vec<i32>,
}

/// The sides of a weight `[outputs, channels, taps]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightShape {
    pub(crate) outputs: usize,
    pub(crate) channels: usize,
    pub(crate) taps: usize,
}

impl WeightShape {
    pub(crate) fn depth(self) -> usize {
        self.channels * self.taps
    }

    fn panels(self) -> usize {
        self.outputs.div_ceil(PANEL)
    }
}

/// The packed panels of a weight. The depth is `[taps, channels]`.
#[derive(Debug)]
pub(crate) struct PackedPanels {
    memory: AlignedBuffer,
    format: PanelFormat,
    /// Numbers down a panel.
    padded_depth: usize,
    /// Empty unless the weights are bytes.
    dequantization: Dequantization,
}

impl PackedPanels {
    /// `weight` is contiguous.
    pub(crate) fn new(weight: &Tensor, shape: WeightShape) -> Result<Self> {
        let guard = TensorGuard::new(weight);
        Ok(match guard.typed_slice()? {
            TypedSlice::F32(from) => Self::pack(from, PanelFormat::F32, shape),
            TypedSlice::F16(from) => Self::pack(from, PanelFormat::F16, shape),
            TypedSlice::Bf16(from) => Self::pack(from, PanelFormat::Bf16, shape),
        })
    }

    /// Quantizes the weights of each output. `weight` is contiguous.
    pub(crate) fn int8(weight: &Tensor, shape: WeightShape) -> Result<Self> {
        let guard = TensorGuard::new(weight);
        Ok(match guard.typed_slice()? {
            TypedSlice::F32(from) => Self::quantize(from, shape),
            TypedSlice::F16(from) => Self::quantize(from, shape),
            TypedSlice::Bf16(from) => Self::quantize(from, shape),
        })
    }

    fn quantize<T: Element>(from: &[T], shape: WeightShape) -> Self {
        let (depth, panels) = (shape.depth(), shape.panels());
        let padded_depth = depth.next_multiple_of(INT8_DEPTH_MULTIPLE);
        let mut memory = AlignedBuffer::zeros(panels * padded_depth * PANEL);
        let mut scales = vec![0.0; panels * PANEL];
        let mut offsets = vec![0; panels * PANEL];
        let parts = (memory.as_mut_slice::<u8>().par_chunks_mut(padded_depth * PANEL))
            .zip(scales.par_chunks_mut(PANEL))
            .zip(offsets.par_chunks_mut(PANEL));
        for_each_part(parts, shape.outputs * depth, |panel, ((to, scales), offsets)| {
            let lines = from[panel * PANEL * depth..].chunks_exact(depth).take(PANEL);
            for (n, line) in lines.enumerate() {
                let scale = QuantScale::new(max_magnitude_bits(line));
                let mut sum = 0;
                // The bytes are computed in the order of the memory that is written.
                for tap in 0..shape.taps {
                    let numbers = line.iter().skip(tap).step_by(shape.taps);
                    for (k, number) in (tap * shape.channels..).zip(numbers) {
                        let byte = scale.byte(*number);
                        sum += i32::from(byte);
                        to[((k / 4) * PANEL + n) * 4 + k % 4] = byte as u8;
                    }
                }
                (scales[n], offsets[n]) = (scale.step, sum.wrapping_mul(128));
            }
        });
        Self { memory, format: PanelFormat::Int8, padded_depth, dequantization: Dequantization { scales, offsets } }
    }

    fn pack<T: Element>(from: &[T], format: PanelFormat, shape: WeightShape) -> Self {
        let depth = shape.depth();
        let padded_depth = depth.next_multiple_of(DEPTH_MULTIPLE);
        let mut memory = AlignedBuffer::zeros(shape.panels() * padded_depth * PANEL * format.size());
        if depth > 0 {
            let parts = memory.as_mut_slice::<T>().par_chunks_mut(padded_depth * PANEL);
            for_each_part(parts, shape.outputs * depth, |panel, to| pack_panel(from, shape, format, panel, to));
        }
        Self { memory, format, padded_depth, dequantization: Dequantization::default() }
    }

    pub(crate) fn format(&self) -> PanelFormat {
        self.format
    }

    pub(crate) fn bytes(&self) -> usize {
        let Dequantization { scales, offsets } = &self.dequantization;
        self.memory.len() + scales.len() * 4 + offsets.len() * 4
    }

    /// Scales and offsets of a panel of bytes.
    pub(crate) fn dequantization(&self, panel: usize) -> Option<(&[f32; PANEL], &[i32; PANEL])> {
        let Dequantization { scales, offsets } = &self.dequantization;
        Some((scales.as_chunks().0.get(panel)?, offsets.as_chunks().0.get(panel)?))
    }

    /// `depth` of panel `panel`, which begins at a multiple of 32.
    fn stored(&self, panel: usize, depth: Range<usize>) -> &[u8] {
        let start = (panel * self.padded_depth + depth.start) * PANEL * self.format.size();
        &self.memory.as_slice()[start..start + depth.len() * PANEL * self.format.size()]
    }

    /// Prefetches `depth` of panel `panel` in `parts` parts.
    pub(crate) fn prefetch(&self, panel: usize, depth: Range<usize>, parts: usize) -> PrefetchRows {
        let lines = (depth.len() * PANEL * self.format.size()).div_ceil(CACHE_LINE);
        let start = (panel * self.padded_depth + depth.start) * PANEL * self.format.size();
        PrefetchRows::new(self.memory.as_slice().as_ptr().wrapping_add(start), 0, 1, lines, parts)
    }

    /// `depth` of panel `panel`, which begins at a multiple of 32, for a micro-kernel of `operands`: the stored panel, or
    /// the panel widened into `scratch`.
    #[expect(unsafe_code, reason = "a panel seen as its numbers")]
    pub(crate) fn panel<'a>(
        &'a self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &'a mut AlignedBuffer,
    ) -> &'a [u8] {
        if operands != Operands::F32 || self.format == PanelFormat::F32 {
            return self.stored(panel, depth);
        }
        let count = depth.len().next_multiple_of(2) * PANEL;
        let from = self.stored(panel, depth.start..depth.start + depth.len().next_multiple_of(2));
        let to = scratch.scratch::<f32>(count);
        // SAFETY: `from` is `count` numbers of two bytes, and begins at a multiple of 64 bytes of memory that is aligned to
        // cache lines; any bits are numbers.
        unsafe {
            match self.format {
                PanelFormat::Bf16 => widen_pairs(std::slice::from_raw_parts(from.as_ptr().cast(), count / 2), to),
                _ => widen_slice(std::slice::from_raw_parts(from.as_ptr().cast::<f16>(), count), to),
            }
        }
        as_bytes(to)
    }
}

/// Packs the outputs of panel `panel` into `to`, which is zeroed.
fn pack_panel<T: Element>(from: &[T], shape: WeightShape, format: PanelFormat, panel: usize, to: &mut [T]) {
    let WeightShape { outputs, channels, taps } = shape;
    let (depth, first) = (shape.depth(), panel * PANEL);
    let lines = PANEL.min(outputs - first);
    // A run is some channels with all their taps. It is copied first, as rows a power of two apart share cache sets.
    let per_run = (RUN / taps).max(2).next_multiple_of(2).min(channels);
    let stride = per_run * taps + 2;
    let mut run = vec![T::zero(); PANEL * stride];
    for channel in (0..channels).step_by(per_run) {
        let count = per_run.min(channels - channel);
        for (n, line) in run.chunks_exact_mut(stride).take(lines).enumerate() {
            let start = (first + n) * depth + channel * taps;
            line[..count * taps].copy_from_slice(&from[start..start + count * taps]);
        }
        for tap in 0..taps {
            let k = tap * channels + channel;
            if format == PanelFormat::Bf16 && k % 2 == 0 && count % 2 == 0 {
                for pair in 0..count / 2 {
                    let at = (k / 2 + pair) * 2 * PANEL;
                    let line = to[at..at + 2 * lines].chunks_exact_mut(2);
                    for (to, from) in line.zip(run.chunks_exact(stride)) {
                        to[0] = from[2 * pair * taps + tap];
                        to[1] = from[(2 * pair + 1) * taps + tap];
                    }
                }
                continue;
            }
            for i in 0..count {
                let k = k + i;
                for (n, from) in run.chunks_exact(stride).take(lines).enumerate() {
                    let at = match format {
                        PanelFormat::Bf16 => ((k / 2) * PANEL + n) * 2 + k % 2,
                        _ => k * PANEL + n,
                    };
                    to[at] = from[i * taps + tap];
                }
            }
        }
    }
}
