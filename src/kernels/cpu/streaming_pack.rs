//! Packs a panel of weights when a product needs it, from weights in the order of their file, `[outputs, depth]`. The
//! transposition costs about a hundredth of a product with 512 rows, and saves a second copy of the weights and the time in
//! which the system would map its pages.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::DType;
use half::bf16;

use crate::kernels::block_format::Coding;
use crate::kernels::cpu::aligned::{AlignedBuffer, CACHE_LINE, as_uninit};
use crate::kernels::cpu::dequantize::{self, EncodedRows};
use crate::kernels::cpu::element::as_bytes;
use crate::kernels::cpu::elementwise::{widen_half_pairs, widen_pairs};
use crate::kernels::cpu::micro::tile::{Operands, PANEL};
use crate::kernels::cpu::prefetch::PrefetchRows;
use crate::kernels::cpu::transpose::{BLOCK, Lines, WORD, transpose_words};

/// Numbers that are decoded before they are rounded.
const AT_ONCE: usize = 256;

impl EncodedRows<'_> {
    /// Prefetches what [`Self::panel`] reads, in `parts` parts.
    pub(crate) fn prefetch(&self, panel: usize, depth: Range<usize>, parts: usize) -> PrefetchRows {
        let (numbers, size) = self.coding.block();
        let first = panel * PANEL;
        let at = self.bytes.as_ptr().wrapping_add((first * self.depth + depth.start) / numbers * size);
        let count = PANEL.min(self.outputs.saturating_sub(first));
        // A row need not begin at a cache line.
        let lines = (depth.len().div_ceil(numbers) * size + at.addr() % CACHE_LINE).div_ceil(CACHE_LINE);
        PrefetchRows::new(at, self.depth * size / numbers, count, lines, parts)
    }

    /// Packs `depth` of panel `panel` into `scratch` for a micro-kernel of `operands`, with zeros beyond the weights. If the
    /// file stores blocks, `depth` begins at a multiple of 32, and so does every row.
    pub(crate) fn panel<'a>(
        &self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &'a mut AlignedBuffer,
    ) -> &'a [u8] {
        let unchanged = self.scale == 1.0 && self.rounded == DType::F32;
        match (operands, self.coding) {
            (Operands::F32, Coding::F32) if unchanged => {
                let words = depth.len();
                let to = scratch.scratch::<u32>((words + BLOCK) * PANEL);
                transpose(self.lines(panel, &depth), words, to);
                word_bytes(to)
            }
            (Operands::F32, Coding::F16 | Coding::Bf16) if unchanged => self.widened(panel, depth, scratch),
            (Operands::Bf16 | Operands::I8 | Operands::U8, Coding::Bf16) if unchanged => {
                let words = (depth.len() * size_of::<bf16>()).div_ceil(WORD);
                let to = scratch.scratch::<u32>((words + BLOCK) * PANEL);
                transpose(self.lines(panel, &depth), words, to);
                word_bytes(to)
            }
            _ => self.decoded(operands, panel, depth, scratch),
        }
    }

    /// Outputs of a panel, and numbers of `depth` that exist.
    fn extent(&self, panel: usize, depth: &Range<usize>) -> (usize, usize) {
        let outputs = PANEL.min(self.outputs.saturating_sub(panel * PANEL));
        (outputs, depth.end.min(self.depth).saturating_sub(depth.start))
    }

    /// The bytes of a panel's outputs, for numbers that are not stored in blocks.
    fn lines(&self, panel: usize, depth: &Range<usize>) -> Lines<'_> {
        let (count, numbers) = self.extent(panel, depth);
        let (_, size) = self.coding.block();
        let bytes = self.bytes.get((panel * PANEL * self.depth + depth.start) * size..).unwrap_or_default();
        Lines { bytes, stride: self.depth * size, count, length: numbers * size }
    }

    /// A panel of f16 or bf16 numbers, transposed in pairs and widened to f32.
    fn widened<'a>(&self, panel: usize, depth: Range<usize>, scratch: &'a mut AlignedBuffer) -> &'a [u8] {
        let words = (depth.len() * size_of::<bf16>()).div_ceil(WORD);
        let transposed = (words + BLOCK) * PANEL;
        let memory = scratch.scratch::<f32>(transposed + 2 * words * PANEL);
        let (pairs, wide) = memory.split_at_mut(transposed);
        let pairs = as_words(pairs);
        transpose(self.lines(panel, &depth), words, pairs);
        match self.coding {
            Coding::F16 => widen_half_pairs(&pairs[..words * PANEL], wide),
            _ => widen_pairs(&pairs[..words * PANEL], wide),
        }
        as_bytes(wide)
    }

    /// A panel of decoded numbers: each output is decoded to a row behind the panel, and the rows are transposed.
    fn decoded<'a>(
        &self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &'a mut AlignedBuffer,
    ) -> &'a [u8] {
        let (count, numbers) = self.extent(panel, &depth);
        let size = operands.size();
        let words = (depth.len() * size).div_ceil(WORD);
        let transposed = (words + BLOCK) * PANEL;
        let stride = words.next_multiple_of(BLOCK) + BLOCK;
        let memory = scratch.scratch::<f32>(transposed + stride * PANEL);
        let (to, rows) = memory.split_at_mut(transposed);
        for (n, row) in rows.chunks_exact_mut(stride).take(count).enumerate() {
            let first = (panel * PANEL + n) * self.depth + depth.start;
            self.decode(operands, first, numbers, row);
        }
        let from = Lines { bytes: as_bytes(rows), stride: stride * WORD, count, length: numbers * size };
        let to = as_words(to);
        transpose(from, words, to);
        word_bytes(to)
    }

    /// Writes `count` numbers from number `first` on to the beginning of `row`, as f32 or as bf16.
    #[expect(unsafe_code, reason = "scratch memory seen as numbers")]
    fn decode(&self, operands: Operands, first: usize, count: usize, row: &mut [f32]) {
        if operands == Operands::F32 {
            return dequantize::decode_rounded(self, first, &mut row[..count]);
        }
        assert!(count <= 2 * row.len(), "more numbers than there is memory for");
        // SAFETY: the row has as many bytes, and the functions below write only initialized numbers.
        let narrow = unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast::<MaybeUninit<bf16>>(), count) };
        if self.coding == Coding::F16 && self.scale == 1.0 {
            return dequantize::f16_to_bf16(self.bytes, first, narrow);
        }
        let mut wide = [0.0; AT_ONCE];
        for (i, narrow) in narrow.chunks_mut(AT_ONCE).enumerate() {
            let wide = &mut wide[..narrow.len()];
            dequantize::decode_scaled(self, first + i * AT_ONCE, wide);
            dequantize::narrow(wide, narrow);
        }
    }
}

/// [`transpose_words`] into scratch memory.
#[expect(unsafe_code, reason = "scratch memory seen as uninitialized")]
fn transpose(from: Lines, words: usize, to: &mut [u32]) {
    // SAFETY: `transpose_words` writes only initialized words.
    transpose_words(from, words, unsafe { as_uninit(to) });
}

#[expect(unsafe_code, reason = "scratch memory seen as words")]
fn as_words(numbers: &mut [f32]) -> &mut [u32] {
    // SAFETY: f32 and u32 have one layout, and any bits are either.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), numbers.len()) }
}

#[expect(unsafe_code, reason = "words seen as their bytes")]
fn word_bytes(words: &[u32]) -> &[u8] {
    // SAFETY: the bytes are the memory of the words and borrowed as long.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}
