//! Panels of weights that are not laid beforehand: the file has `[outputs, depth]`, and a panel wants the outputs side by
//! side. The turn costs about a hundredth of a product with 512 rows, and saves weights a second place in memory and the
//! time in which the system would make its pages.

use std::ops::Range;

use candle_core::{DType, Result};
use half::bf16;

use crate::kernels::block_format::Coding;
use crate::kernels::cpu::dequantize;
use crate::kernels::cpu::element::{Element, Held};
use crate::kernels::cpu::micro::{self, Operands, PANEL};
use crate::kernels::cpu::packed::{Aligned, LINE, Laid, Packed};
use crate::kernels::cpu::simd;

/// Bytes of a word: what is moved as one, a pair of narrow numbers or one f32.
pub(crate) const WORD: usize = 4;
/// Numbers that are decoded before they are rounded.
const AT_ONCE: usize = 256;
/// Words of a block that is turned at once: a cache line of them.
pub(crate) const BLOCK: usize = 16;

/// The panels of one layer for the time of one product.
pub(crate) enum Panels<'a> {
    Laid(&'a Laid),
    /// Of a convolution that is seldom made so: beside the file they would take its place a second time.
    Once(Laid),
    Rows(Rows<'a>),
}

/// Weights as they are stored, `[outputs, depth]`.
pub(crate) struct Rows<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) coding: Coding,
    /// What the numbers are rounded to; f32 where they are not.
    pub(crate) rounded: DType,
    /// Times which they count.
    pub(crate) scale: f32,
    pub(crate) outputs: usize,
    pub(crate) depth: usize,
}

impl<'a> Panels<'a> {
    /// `held` is what `packed` holds, if it holds something.
    pub(crate) fn new(packed: &'a Packed, held: Option<&'a Held<'a>>) -> Result<Self> {
        let rows = held.filter(|_| packed.is_flat()).map(|held| packed.rows(held)).transpose()?.flatten();
        Ok(match (rows, packed.laid()) {
            (Some(rows), _) => Self::Rows(rows),
            (None, Some(laid)) => Self::Laid(laid),
            (None, None) => Self::Once(packed.lay()?),
        })
    }

    /// Panel `panel` between `depth`, which begins at a multiple of 32, for a micro-kernel of `operands`: where it
    /// stands, or made in `scratch`. Beyond the weights it has zeros.
    pub(crate) fn panel(
        &self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &mut Aligned,
    ) -> *const u8 {
        match self {
            Self::Laid(laid) => laid.panel(operands, panel, depth, scratch),
            Self::Once(laid) => laid.panel(operands, panel, depth, scratch),
            Self::Rows(rows) => rows.panel(operands, panel, depth, scratch),
        }
    }

    /// What [`Self::panel`] will read for `depth`, to be asked for in `parts`.
    pub(crate) fn ahead(&self, panel: usize, depth: Range<usize>, parts: usize) -> Ahead {
        if depth.is_empty() {
            return Ahead { at: std::ptr::null(), stride: 0, rows: 0, across: 0, line: 0, part: 0 };
        }
        let laid: &Laid = match self {
            Self::Rows(rows) => return rows.ahead(panel, depth, parts),
            Self::Laid(laid) => laid,
            Self::Once(laid) => laid,
        };
        let across = laid.stretch(depth.len()).div_ceil(LINE);
        let (at, part) = (laid.start(panel, depth.start), across.div_ceil(parts));
        Ahead { at, stride: 0, rows: 1, across, line: 0, part }
    }
}

/// Memory that will be read: some rows of cache lines.
pub(crate) struct Ahead {
    at: *const u8,
    stride: usize,
    rows: usize,
    across: usize,
    /// How many of the first row have been asked for.
    line: usize,
    /// How many are asked for at once.
    part: usize,
}

impl Ahead {
    /// Asks for the next part to be brought to the second cache.
    #[inline]
    pub(crate) fn fetch(&mut self) {
        let mut left = self.part;
        while self.rows > 0 && left > 0 {
            let lines = (self.across - self.line).min(left);
            micro::prefetch(self.at.wrapping_add(self.line * LINE), lines * LINE);
            (self.line, left) = (self.line + lines, left - lines);
            if self.line == self.across {
                (self.at, self.line, self.rows) = (self.at.wrapping_add(self.stride), 0, self.rows - 1);
            }
        }
    }
}

impl Rows<'_> {
    /// As [`Panels::ahead`].
    fn ahead(&self, panel: usize, depth: Range<usize>, parts: usize) -> Ahead {
        let (numbers, size) = self.coding.block();
        let first = panel * PANEL;
        let at = self.bytes.as_ptr().wrapping_add((first * self.depth + depth.start) / numbers * size);
        let count = PANEL.min(self.outputs.saturating_sub(first));
        // A row need not begin with a cache line.
        let across = (depth.len().div_ceil(numbers) * size + at.addr() % LINE).div_ceil(LINE);
        let part = (count * across).div_ceil(parts);
        Ahead { at, stride: self.depth * size / numbers, rows: count, across, line: 0, part }
    }

    /// As [`Panels::panel`]. Where numbers are written in blocks, `depth` begins with a multiple of 32 and so does every
    /// row.
    #[expect(unsafe_code, reason = "scratch memory seen as numbers")]
    pub(crate) fn panel(
        &self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &mut Aligned,
    ) -> *const u8 {
        let first = panel * PANEL;
        let count = PANEL.min(self.outputs.saturating_sub(first));
        let there = depth.end.min(self.depth).saturating_sub(depth.start);
        let is_stored = self.scale == 1.0 && self.rounded == DType::F32;
        let decoded = match (operands, self.coding) {
            (Operands::F32, Coding::F32 | Coding::F16 | Coding::Bf16) => !is_stored,
            (Operands::F32, _) => true,
            (_, coding) => !(is_stored && coding == Coding::Bf16),
        };
        let (_, stored) = self.coding.block();
        let size = if decoded { operands.size() } else { stored };
        let words = (depth.len() * size).div_ceil(WORD);
        let widened = operands == Operands::F32 && size < WORD;
        let turned = (words + BLOCK) * PANEL;
        // Behind what is turned: numbers that were decoded wait there, or those go there that are widened.
        let stride = words.next_multiple_of(BLOCK) + BLOCK;
        let behind = match (decoded, widened) {
            (true, _) => stride * PANEL,
            (false, true) => 2 * words * PANEL,
            (false, false) => 0,
        };
        let to = scratch.at_least((turned + behind) * WORD);
        // SAFETY: `scratch` has as many bytes, which have been written before, if only with zeros; it begins with a cache
        // line, and any bits are a number.
        let (pairs, behind) = unsafe {
            (
                std::slice::from_raw_parts_mut(to.cast::<u32>(), turned),
                std::slice::from_raw_parts_mut(to.cast::<f32>().wrapping_add(turned), behind),
            )
        };
        if decoded {
            for (n, row) in behind.chunks_exact_mut(stride).take(count).enumerate() {
                self.decode(operands, (first + n) * self.depth + depth.start, there, row);
            }
            let from = Lines { bytes: as_bytes(behind), stride: stride * WORD, count, length: there * size };
            turn(from, words, pairs);
            return to;
        }
        let from = Lines {
            bytes: self.bytes.get((first * self.depth + depth.start) * size..).unwrap_or_default(),
            stride: self.depth * size,
            count,
            length: there * size,
        };
        turn(from, words, pairs);
        if !widened {
            return to;
        }
        match self.coding {
            Coding::F16 => simd::widen_half_pairs(&pairs[..words * PANEL], behind),
            _ => simd::widen_pairs(&pairs[..words * PANEL], behind),
        }
        behind.as_ptr().cast()
    }

    /// Writes `count` numbers from `first` on to the beginning of `row`, as f32 or as bf16.
    #[expect(unsafe_code, reason = "scratch memory seen as numbers")]
    fn decode(&self, operands: Operands, first: usize, count: usize, row: &mut [f32]) {
        if operands == Operands::F32 {
            return dequantize::rounded(self, first, &mut row[..count]);
        }
        assert!(count <= 2 * row.len(), "more numbers than there is memory for");
        // SAFETY: the row has as many bytes; any bits are bf16.
        let narrow = unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast::<bf16>(), count) };
        if self.coding == Coding::F16 && self.scale == 1.0 {
            return dequantize::f16_to_bf16(self.bytes, first, narrow);
        }
        let mut wide = [0.0; AT_ONCE];
        for (i, narrow) in narrow.chunks_mut(AT_ONCE).enumerate() {
            let wide = &mut wide[..narrow.len()];
            dequantize::scaled(self, first + i * AT_ONCE, wide);
            dequantize::narrow(wide, narrow);
        }
    }
}

#[expect(unsafe_code, reason = "numbers are moved as the bytes that they are")]
pub(crate) fn as_bytes<T: Element>(numbers: &[T]) -> &[u8] {
    // SAFETY: the bytes are those of the numbers, and are borrowed as long; f32, bf16 and f16 have no padding.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// `count` lines of `length` bytes, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a> {
    bytes: &'a [u8],
    stride: usize,
    count: usize,
    length: usize,
}

impl<'a> Lines<'a> {
    /// `count` lines of `length` numbers, `stride` numbers apart.
    pub(crate) fn new<T: Element>(numbers: &'a [T], stride: usize, (count, length): (usize, usize)) -> Self {
        let size = size_of::<T>();
        Self { bytes: as_bytes(numbers), stride: stride * size, count, length: length * size }
    }
}

/// Writes `[words, 32]`: word `w` of line `n` to `w · 32 + n`, and zeros where there is no such line or word. `to` has room
/// for 16 words more, in which anything may be left.
pub(crate) fn turn(from: Lines, words: usize, to: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() >= simd::Level::Avx512 {
        let last = (from.count.saturating_sub(1)) * from.stride + from.length;
        assert!(from.count == 0 || last <= from.bytes.len(), "lines beyond the weights");
        #[expect(unsafe_code, reason = "vector instructions")]
        // SAFETY: the lines are within `from.bytes`, as was just checked; the instructions are there at this level.
        unsafe {
            return avx512::turn(from, words, to);
        }
    }
    let whole = from.length / WORD;
    to[..words * PANEL].fill(0);
    for n in 0..from.count {
        let line = &from.bytes[n * from.stride..][..from.length];
        let (words, rest) = line.as_chunks::<WORD>();
        for (to, word) in to[n..].iter_mut().step_by(PANEL).zip(words) {
            *to = u32::from_ne_bytes(*word);
        }
        if let [a, b, ..] = *rest {
            to[whole * PANEL + n] = u32::from_ne_bytes([a, b, 0, 0]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! Squares of 16 × 16 words, turned in registers.
    #![expect(unsafe_code, reason = "vector instructions on pointers")]

    use std::arch::x86_64::{
        __m512i, __mmask32, _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    use super::{BLOCK, LINE, Lines, PANEL, WORD};

    /// # Safety
    /// The lines lie within their bytes; AVX-512 F and BW are there.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) unsafe fn turn(from: Lines, words: usize, to: &mut [u32]) {
        // Lines often lie alike on cache lines. A first block that is short has the others begin with one, so that none is
        // read twice: lines a power of two apart share so few places in the first cache that none stays there.
        let askew = from.bytes.as_ptr().addr() % LINE;
        let first = if askew.is_multiple_of(WORD) { LINE - askew } else { LINE };
        let mut word = 0;
        while word < words {
            let length = if word == 0 { first } else { LINE };
            let to = &mut to[word * PANEL..][..BLOCK * PANEL];
            let left = from.length.saturating_sub(word * WORD).min(length);
            for half in 0..PANEL / BLOCK {
                let to = &mut to[half * BLOCK..];
                let start = from.bytes.as_ptr().wrapping_add(half * BLOCK * from.stride + word * WORD);
                let count = from.count.saturating_sub(half * BLOCK).min(BLOCK);
                // SAFETY: the lines are there, and have a block's words, or what is masked is not read.
                unsafe {
                    if count == BLOCK && left == LINE {
                        square(|n| _mm512_loadu_si512(start.wrapping_add(n * from.stride).cast()), to);
                    } else {
                        let mask = ((1_u64 << (left / 2)) - 1) as __mmask32;
                        let line = |n| _mm512_maskz_loadu_epi16(mask, start.wrapping_add(n * from.stride).cast());
                        square(|n| if n < count { line(n) } else { _mm512_setzero_si512() }, to);
                    }
                }
            }
            word += length / WORD;
        }
    }

    /// Writes word `w` of line `n` to `w · 32 + n`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn square(line: impl Fn(usize) -> __m512i, to: &mut [u32]) {
        // Lane `l` of `fours[4g + c]` is word `4l + c` of lines `4g` to `4g + 3`.
        let mut fours = [_mm512_setzero_si512(); BLOCK];
        for (group, four) in fours.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (a, b) = (line(4 * group), line(4 * group + 1));
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (c, d) = (line(4 * group + 2), line(4 * group + 3));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            *four = [
                _mm512_unpacklo_epi64(ab_low, cd_low),
                _mm512_unpackhi_epi64(ab_low, cd_low),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ];
        }
        let mut put = |word: usize, column: __m512i| {
            let to = to[word * PANEL..][..BLOCK].as_mut_ptr();
            // SAFETY: 16 words are there.
            unsafe { _mm512_storeu_si512(to.cast(), column) };
        };
        for c in 0..4 {
            let lines = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            // Even lanes, then odd ones.
            let low = _mm512_shuffle_i32x4::<0x88>(lines[0], lines[1]);
            let high = _mm512_shuffle_i32x4::<0x88>(lines[2], lines[3]);
            put(c, _mm512_shuffle_i32x4::<0x88>(low, high));
            put(8 + c, _mm512_shuffle_i32x4::<0xdd>(low, high));
            let low = _mm512_shuffle_i32x4::<0xdd>(lines[0], lines[1]);
            let high = _mm512_shuffle_i32x4::<0xdd>(lines[2], lines[3]);
            put(4 + c, _mm512_shuffle_i32x4::<0x88>(low, high));
            put(12 + c, _mm512_shuffle_i32x4::<0xdd>(low, high));
        }
    }
}
