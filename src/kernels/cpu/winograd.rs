//! Convolutions of 3×3 by minimal filtering, F(2×2, 3×3) (Winograd 1980; Lavin & Gray 2016): a tile of 2×2 results takes
//! 16 products a channel in place of 36, for a few additions before and after. Those additions are made in f32; where
//! products are of bf16, what they give is rounded to bf16 once more, which costs no more than the rounding of the result.
//! AMX multiplies so fast that the additions would take longer than the products they save.
//!
//! Legend: a *tile* is 2×2 positions of the result; a *point* is one of the 16 products of a tile.

use std::ops::Range;

use candle_core::{Result, bail};

use crate::kernels::cpu::element::{Element, Held};
use crate::kernels::cpu::epilogue::{Finish, Spot, Target, finish_tile};
use crate::kernels::cpu::gemm::After;
use crate::kernels::cpu::micro::{self, A_BYTES, A_STRIDE, Call, Micro, Operands, PANEL};
use crate::kernels::cpu::packed::{Aligned, LINE, Packed};
use crate::kernels::cpu::parallel::{Scratch, Shared, for_each, threads, with_scratch};
use crate::kernels::cpu::simd::{self, levels};
use crate::kernels::cpu::streaming_pack::Rows;
use crate::kernels::{ConvShape, Padding};

/// Products of a tile for one channel.
const POINTS: usize = 16;
/// Channels of which filters are transformed at a time; the channels are a multiple of it.
const GRAIN: usize = 32;

/// Bytes of filters that are made at a time, about: the last cache has room for them, and no filters of a whole layer,
/// which are 16/9 of its weights, ever take memory.
const FILTERS: usize = 16 << 20;

/// Sizes that were found fastest.
#[derive(Clone, Copy)]
struct Tuning {
    /// Channels that are summed at a time, at most. In f32 as many as [`crate::kernels::cpu::gemm`] takes in a chain.
    chain: usize,
    /// Panels of a task, at most.
    panels: usize,
    /// What a task keeps in the second cache, in bytes.
    cache: usize,
    /// Positions of a sample below which the filters' transformation is not worth it.
    least: usize,
}

impl Tuning {
    fn of(operands: Operands) -> Self {
        match operands {
            Operands::Bf16 => Self { chain: 256, panels: 5, cache: 1 << 20, least: 256 },
            _ => Self { chain: 128, panels: 4, cache: 5 << 18, least: 256 },
        }
    }
}

/// Whether [`convolve`] takes convolutions of such a shape, and gains by it where feature maps are not small. `narrow` says
/// whether weights and activations are bf16.
pub(crate) fn fits(shape: ConvShape, narrow: bool) -> bool {
    let same = shape.kernel == 3 && shape.stride == 1 && shape.padding == Padding::same(1);
    let wide = shape.inputs >= 2 * GRAIN && shape.inputs.is_multiple_of(GRAIN) && shape.outputs >= 2 * PANEL;
    let operands = Micro::new(narrow).operands;
    let by_tiles = operands == Operands::Bf16 && simd::level() == simd::Level::Amx;
    same && wide && !by_tiles
}

/// Whether [`convolve`] takes a convolution with these weights.
pub(crate) fn serves<T: Element>(weight: &Packed, shape: ConvShape, (height, width): (usize, usize)) -> bool {
    let narrow = !T::IS_F32 && weight.is_bf16();
    let kept = weight.held().is_some() && weight.outputs() == shape.outputs && weight.depth() == 9 * shape.inputs;
    kept && fits(shape, narrow) && height * width >= Tuning::of(Micro::new(narrow).operands).least
}

struct Convolution<'a, T> {
    /// `[B, H, W, C]`
    numbers: &'a [T],
    height: usize,
    width: usize,
    channels: usize,
    /// Tiles of a column and of a row.
    tiles: (usize, usize),
    /// Of some panels, `[panels, C / chain, 16, chain, 32]`, the last of the chains shorter where `C` is no multiple; bf16
    /// in pairs of channels, as in a panel of weights.
    filters: Aligned,
    /// Those panels.
    made: Range<usize>,
    outputs: usize,
    micro: Micro,
    chain: usize,
    finish: Finish<'a, T>,
}

/// `numbers` is `[batch, height, width, C]`; gives as many positions of the weights' outputs. `serves` said so.
pub(crate) fn convolve<T: Element>(
    numbers: &[T],
    (batch, height, width): (usize, usize, usize),
    weight: &Packed,
    after: &After,
) -> Result<Vec<T>> {
    let (outputs, channels) = (weight.outputs(), weight.depth() / 9);
    let finish = Finish {
        bias: after.bias.as_ref().map(Held::slice).transpose()?,
        per_sample: after.per_sample.as_ref().map(Held::slice).transpose()?,
        activation: after.activation,
        residual: after.residual.as_ref().map(Held::slice).transpose()?,
        sample: after.sample.max(1),
        outputs,
    };
    let tiles = (height.div_ceil(2), width.div_ceil(2));
    let all = batch * tiles.0 * tiles.1;
    let micro = Micro::new(!T::IS_F32 && weight.is_bf16());
    let tuning = Tuning::of(micro.operands);
    let chain = channels.div_ceil(channels.div_ceil(tuning.chain)).next_multiple_of(GRAIN);
    let held = weight.held();
    let Some(rows) = held.as_ref().map(|held| weight.rows(held)).transpose()?.flatten() else {
        bail!("weights that were laid beforehand");
    };

    let panels = outputs.div_ceil(PANEL);
    let panel_block = panels.div_ceil(panels.div_ceil(tuning.panels));
    let of_panel = POINTS * channels * PANEL * micro.operands.size();
    let at_a_time = (FILTERS / (panel_block * of_panel)).max(1) * panel_block;
    // A tile's share of the second cache: its pixels' sums, and its points' sums of every panel that waits for more.
    let kept = if chain < channels { panel_block } else { 1 };
    let bytes = POINTS * (chain * micro.operands.size() + kept * PANEL * 4);
    let at_once = micro.rows;
    let most = (tuning.cache / bytes / at_once).max(1);
    let units = all.div_ceil(at_once);
    let down = units.div_ceil(most).next_multiple_of(threads()).min(units).max(1);
    // Parts of the tiles that are as even as can be.
    let until = |part: usize| (part * units / down * at_once).min(all);

    let mut out = T::unwritten(batch * height * width * outputs);
    let shared = Shared::new(&mut out);
    let filters = Aligned::unwritten(at_a_time.min(panels) * of_panel);
    let mut convolution =
        Convolution { numbers, height, width, channels, tiles, filters, made: 0..0, outputs, micro, chain, finish };
    for first in (0..panels).step_by(at_a_time) {
        convolution.made = first..(first + at_a_time).min(panels);
        transform(&rows, (channels, chain), micro.operands, &convolution.made, &convolution.filters);
        let across = convolution.made.len().div_ceil(panel_block);
        for_each(down * across, all * channels * convolution.made.len() * PANEL, |task| {
            let (part, panel) = (task % down, first + (task / down) * panel_block);
            let tiles = until(part)..until(part + 1);
            let panels = panel..(panel + panel_block).min(convolution.made.end);
            with_scratch(|scratch| convolution.task(tiles, panels, &shared, scratch));
        });
    }
    Ok(out)
}

/// Writes the filters of `panels` at all points to `memory`, from weights `[outputs, channels, 9]`.
#[expect(unsafe_code, reason = "panels are written by several threads")]
fn transform(
    weight: &Rows,
    (channels, chain): (usize, usize),
    operands: Operands,
    panels: &Range<usize>,
    memory: &Aligned,
) {
    let size = operands.size();
    for_each(panels.len(), POINTS * panels.len() * channels * PANEL, |place| {
        let panel = panels.start + place;
        with_scratch(|Scratch { panel: turned, .. }| {
            for channel in (0..channels).step_by(GRAIN) {
                let first = channel / chain * chain;
                let depth = chain.min(channels - first);
                let number = (place * channels + first) * POINTS + channel - first;
                let to = Points { start: memory.at(number * PANEL * size), between: depth * PANEL * size };
                let taps = weight.panel(operands, panel, 9 * channel..9 * (channel + GRAIN), turned);
                #[cfg(target_arch = "x86_64")]
                if operands == Operands::Bf16 {
                    // SAFETY: a panel has 9 taps of `GRAIN` channels, and `memory` as many channels at each point; bf16
                    // operands are chosen with AVX-512 BF16 alone.
                    unsafe { avx512::filters(taps, to) };
                    continue;
                }
                // SAFETY: a panel has 32 numbers at each of these depths.
                let taps = unsafe { std::slice::from_raw_parts(taps.cast::<f32>(), 9 * GRAIN * PANEL) };
                transform_filters(taps, to);
            }
        });
    });
}

/// Of one column of three weights, all four points.
#[inline(always)]
fn filter(a: f32, b: f32, c: f32) -> [f32; 4] {
    let (ends, middle) = (0.5 * (a + c), 0.5 * b);
    [a, ends + middle, ends - middle, c]
}

/// Of one column of four pixels, all four points.
#[inline(always)]
fn spread([a, b, c, d]: [f32; 4]) -> [f32; 4] {
    [a - c, b + c, c - b, b - d]
}

/// Of one column of four points, both results.
#[inline(always)]
fn collect([a, b, c, d]: [f32; 4]) -> [f32; 2] {
    [a + b + c, b - c - d]
}

const LANES: usize = 16;

levels! {
    /// `taps` is `[channels, 9, 32]`.
    fn transform_filters(taps: &[f32], to: Points) {
        for (channel, taps) in taps.chunks_exact(9 * PANEL).enumerate() {
            for at in (0..PANEL).step_by(LANES) {
                let mut points = [[0.0; LANES]; POINTS];
                for lane in 0..LANES {
                    let tap = |row: usize, column: usize| taps[(row * 3 + column) * PANEL + at + lane];
                    let columns: [[f32; 4]; 3] =
                        std::array::from_fn(|column| filter(tap(0, column), tap(1, column), tap(2, column)));
                    for row in 0..4 {
                        let line = filter(columns[0][row], columns[1][row], columns[2][row]);
                        for column in 0..4 {
                            points[row * 4 + column][lane] = line[column];
                        }
                    }
                }
                for (point, numbers) in points.iter().enumerate() {
                    to.put(point, channel * PANEL + at, numbers);
                }
            }
        }
    }

    /// The points of the 16 pixels of a tile, for as many channels as each of `pixels` has, a multiple of 16.
    fn transform_pixels<T>(pixels: [&[T]; POINTS], to: Points) {
        for at in (0..pixels[0].len()).step_by(LANES) {
            let mut numbers = [[0.0; LANES]; POINTS];
            for (numbers, pixel) in numbers.iter_mut().zip(pixels) {
                if let Some(pixel) = pixel[at..].first_chunk::<LANES>() {
                    for (number, pixel) in numbers.iter_mut().zip(pixel) {
                        *number = pixel.widen();
                    }
                }
            }
            let mut points = [[0.0; LANES]; POINTS];
            for lane in 0..LANES {
                let columns: [[f32; 4]; 4] =
                    std::array::from_fn(|column| spread(std::array::from_fn(|row| numbers[row * 4 + column][lane])));
                for row in 0..4 {
                    let line = spread(std::array::from_fn(|column| columns[column][row]));
                    for column in 0..4 {
                        points[row * 4 + column][lane] = line[column];
                    }
                }
            }
            for (point, numbers) in points.iter().enumerate() {
                to.put(point, at, numbers);
            }
        }
    }

    /// The four results of tiles: `sums` is `[16, stride, 32]`, of which tiles `first..` are taken, as many as `upper` has
    /// pairs; `upper` and `lower` are `[2 · tiles, 32]`.
    fn transform_sums(sums: &[f32], stride: usize, first: usize, upper: &mut [f32], lower: &mut [f32]) {
        let pairs = upper.chunks_exact_mut(2 * PANEL).zip(lower.chunks_exact_mut(2 * PANEL));
        for (tile, (upper, lower)) in (first..).zip(pairs) {
            for at in (0..PANEL).step_by(LANES) {
                let mut points = [[0.0; LANES]; POINTS];
                for (point, numbers) in points.iter_mut().enumerate() {
                    numbers.copy_from_slice(&sums[(point * stride + tile) * PANEL + at..][..LANES]);
                }
                let mut results = [[0.0; LANES]; 4];
                for lane in 0..LANES {
                    let columns: [[f32; 2]; 4] = std::array::from_fn(|column| {
                        collect(std::array::from_fn(|row| points[row * 4 + column][lane]))
                    });
                    for row in 0..2 {
                        let [left, right] = collect(std::array::from_fn(|column| columns[column][row]));
                        (results[row * 2][lane], results[row * 2 + 1][lane]) = (left, right);
                    }
                }
                upper[at..][..LANES].copy_from_slice(&results[0]);
                upper[PANEL + at..][..LANES].copy_from_slice(&results[1]);
                lower[at..][..LANES].copy_from_slice(&results[2]);
                lower[PANEL + at..][..LANES].copy_from_slice(&results[3]);
            }
        }
    }
}

/// Where 16 points go, `between` bytes apart. No other task uses the memory meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Points {
    start: *mut u8,
    between: usize,
}

impl Points {
    #[expect(unsafe_code, reason = "a block of bytes seen as rows of numbers")]
    #[inline(always)]
    fn put(self, point: usize, at: usize, numbers: &[f32; LANES]) {
        let to = self.start.wrapping_add(point * self.between + at * 4).cast::<[f32; LANES]>();
        // SAFETY: whoever made `self` has memory for 16 points of as many numbers as are transformed.
        unsafe { to.write_unaligned(*numbers) }
    }
}

impl<T: Element> Convolution<'_, T> {
    /// Writes the points of `tiles`, one a row, of the channels `channels`.
    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "functions compiled for more than the baseline"))]
    fn fill(&self, tiles: Range<usize>, channels: Range<usize>, block: *mut u8, between: usize) {
        let outside = [T::zero(); A_BYTES / 2];
        let outside = &outside[..channels.len()];
        for (line, tile) in tiles.enumerate() {
            let (x, y) = (tile % self.tiles.1, tile / self.tiles.1 % self.tiles.0);
            let sample = tile / (self.tiles.0 * self.tiles.1);
            let pixels = std::array::from_fn(|i| {
                let row = (2 * y + i / 4).checked_sub(1).filter(|row| *row < self.height);
                let column = (2 * x + i % 4).checked_sub(1).filter(|column| *column < self.width);
                row.zip(column).map_or(outside, |(row, column)| {
                    let start = ((sample * self.height + row) * self.width + column) * self.channels;
                    &self.numbers[start + channels.start..start + channels.end]
                })
            });
            let to = Points { start: block.wrapping_add(line * A_STRIDE), between };
            #[cfg(target_arch = "x86_64")]
            if self.micro.operands == Operands::Bf16 {
                // SAFETY: the operands are bf16 only where the numbers are, and where AVX-512 BF16 is here; the slices are
                // of one length, a multiple of 32, and a row of the block has as many numbers.
                unsafe { avx512::pixels(pixels.map(|pixel| pixel.as_ptr().cast()), channels.len(), to) };
                continue;
            }
            transform_pixels(pixels, to);
        }
    }

    #[expect(unsafe_code, reason = "micro-kernels take pointers")]
    fn task(&self, tiles: Range<usize>, panels: Range<usize>, out: &Shared<T>, scratch: &mut Scratch) {
        let Scratch { rows: block, values, sums, .. } = scratch;
        let at_once = self.micro.rows;
        let padded = tiles.len().next_multiple_of(at_once);
        let between = padded * A_STRIDE;
        let block = block.at_least(POINTS * between);
        let tile_sums = padded * PANEL; // of one point of one panel
        // With one chain a panel's sums are done with before the next begins.
        let kept = if self.chain < self.channels { panels.len() } else { 1 };
        let sums = sums.at_least(kept * POINTS * tile_sums * 4).cast::<f32>();
        let results = values.at_least(2 * 2 * tiles.len() * PANEL * 4).cast::<f32>();
        // SAFETY: as long as it was just made; nothing else uses it.
        let results = unsafe { std::slice::from_raw_parts_mut(results, 4 * tiles.len() * PANEL) };
        // SAFETY: the positions and columns of this task are its own.
        let target = unsafe { Target::new(out.at(0)) };
        let size = self.micro.operands.size();
        self.micro.within(|| {
            for start in (0..self.channels).step_by(self.chain) {
                let channels = start..(start + self.chain).min(self.channels);
                let depth = channels.len();
                self.fill(tiles.clone(), channels, block, between);
                for (i, panel) in panels.clone().enumerate() {
                    let sums = sums.wrapping_add((i % kept) * POINTS * tile_sums);
                    let place = panel - self.made.start;
                    let filters = (place * self.channels + start) * POINTS * PANEL * size;
                    for point in 0..POINTS {
                        let b = self.filters.at(filters + point * depth * PANEL * size).cast_const();
                        // What comes after this point is fetched meanwhile, a part with each tile.
                        let ahead = b.wrapping_add(depth * PANEL * size);
                        let part = (depth * PANEL * size / (padded / at_once)).next_multiple_of(LINE);
                        for first in (0..tiles.len()).step_by(at_once) {
                            micro::prefetch(ahead.wrapping_add(first / at_once * part), part);
                            let a = block.wrapping_add(point * between + first * A_STRIDE);
                            let c = sums.wrapping_add(point * tile_sums + first * PANEL);
                            let rows = at_once.min(tiles.len() - first);
                            // SAFETY: the block has `padded` rows a point and the sums as many of 32, both multiples of
                            // what is taken at once; channels are a multiple of the grain of f32 and bf16 operands.
                            unsafe { self.micro.run(&Call { a, b, depth, c, rows, add: start > 0 }) }
                        }
                    }
                    if start + depth == self.channels {
                        // SAFETY: these sums have been written for all channels.
                        let sums = unsafe { std::slice::from_raw_parts(sums, POINTS * tile_sums) };
                        self.write(sums, padded, &tiles, panel * PANEL, results, target);
                    }
                }
            }
        });
    }

    /// Results of one panel: `sums` is `[16, padded, 32]`.
    fn write(
        &self,
        sums: &[f32],
        padded: usize,
        tiles: &Range<usize>,
        column: usize,
        results: &mut [f32],
        target: Target<T>,
    ) {
        let columns = PANEL.min(self.outputs - column);
        let mut tile = tiles.start;
        while tile < tiles.end {
            let x = tile % self.tiles.1;
            let line = tile / self.tiles.1; // of tiles, over all samples
            let count = (self.tiles.1 - x).min(tiles.end - tile);
            let (upper, rest) = results.split_at_mut(2 * count * PANEL);
            let lower = &mut rest[..2 * count * PANEL];
            transform_sums(sums, padded, tile - tiles.start, upper, lower);
            let (sample, y) = (line / self.tiles.0, 2 * (line % self.tiles.0));
            let rows = (2 * count).min(self.width - 2 * x);
            for (y, results) in [(y, &*upper), (y + 1, &*lower)] {
                if y < self.height {
                    let row = (sample * self.height + y) * self.width + 2 * x;
                    finish_tile(&self.finish, results, Spot { row, rows, column, columns }, target);
                }
            }
            tile += count;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions on pointers")]
mod avx512 {
    use std::arch::x86_64::{
        __m256bh, __m256i, __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_ps,
        _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh,
        _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_slli_epi32, _mm512_storeu_si512, _mm512_sub_ps,
    };
    use std::mem::transmute;

    use half::bf16;

    use super::{GRAIN, PANEL, POINTS, Points};

    /// Numbers of a vector of f32.
    const WIDTH: usize = 16;
    /// Bytes of a pair of numbers of each output of a panel.
    const LINE_OF_PAIRS: usize = PANEL * 2 * size_of::<bf16>();

    /// As [`super::spread`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn spread([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
        [_mm512_sub_ps(a, c), _mm512_add_ps(b, c), _mm512_sub_ps(c, b), _mm512_sub_ps(b, d)]
    }

    /// As [`super::filter`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn filter([a, b, c]: [__m512; 3]) -> [__m512; 4] {
        let half = _mm512_set1_ps(0.5);
        let (ends, middle) = (_mm512_mul_ps(half, _mm512_add_ps(a, c)), _mm512_mul_ps(half, b));
        [a, _mm512_add_ps(ends, middle), _mm512_sub_ps(ends, middle), c]
    }

    /// The points of the 16 pixels of a tile for `count` channels, a multiple of 16.
    ///
    /// # Safety
    /// Each pixel has `count` numbers, and there is memory for as many bf16 at each point.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(crate) unsafe fn pixels(pixels: [*const bf16; POINTS], count: usize, to: Points) {
        for at in (0..count).step_by(WIDTH) {
            // SAFETY: 16 numbers from `at` on are there.
            let number = |i: usize| unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(pixels[i].add(at).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            };
            let columns = [0, 1, 2, 3].map(|column| spread([0, 4, 8, 12].map(|row| number(row + column))));
            for row in 0..4 {
                let line = spread(columns.map(|column| column[row]));
                for (column, numbers) in line.into_iter().enumerate() {
                    // SAFETY: any bits are bf16, and there is memory for 16 of them.
                    unsafe {
                        let narrow = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
                        let point = to.start.add((row * 4 + column) * to.between + at * size_of::<bf16>());
                        _mm256_storeu_si256(point.cast(), narrow);
                    }
                }
            }
        }
    }

    /// The points of [`GRAIN`] channels of a panel, whose weights `taps` has as `[channels, 9]`, in pairs of bf16. Points
    /// are laid in pairs of channels.
    ///
    /// # Safety
    /// `taps` has [`GRAIN`] channels, and there is memory for as many at each point.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(crate) unsafe fn filters(taps: *const u8, to: Points) {
        /// Numbers 0 to 15 of the first half and of the second in turn.
        const PAIRS: [u16; 2 * WIDTH] = {
            let mut pairs = [0; 2 * WIDTH];
            let mut i = 0;
            while i < 2 * WIDTH {
                pairs[i] = (i / 2 + i % 2 * WIDTH) as u16;
                i += 1;
            }
            pairs
        };
        let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        // SAFETY: 64 bytes.
        let pairs = unsafe { _mm512_loadu_si512(PAIRS.as_ptr().cast()) };
        // A line is 16 outputs of two channels.
        for line in 0..GRAIN / 2 * PANEL / WIDTH {
            let at = line * size_of::<__m512i>();
            // SAFETY: a panel has as many lines.
            // Two channels are 18 numbers, which begin with a pair.
            let pairs_of = taps.wrapping_add(line / 2 * 9 * LINE_OF_PAIRS + line % 2 * size_of::<__m512i>());
            let number = |i: usize| unsafe {
                // SAFETY: a panel has 9 lines of pairs for two channels.
                let pair = _mm512_loadu_si512(pairs_of.add(i / 2 * LINE_OF_PAIRS).cast());
                _mm512_castsi512_ps(if i.is_multiple_of(2) {
                    _mm512_slli_epi32::<16>(pair)
                } else {
                    _mm512_and_si512(pair, high)
                })
            };
            let columns =
                |first: usize| [0, 1, 2].map(|column| filter([0, 3, 6].map(|row| number(first + row + column))));
            let (evens, odds) = (columns(0), columns(9));
            for row in 0..4 {
                let even = filter(evens.map(|column| column[row]));
                let odd = filter(odds.map(|column| column[row]));
                for (column, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                    // SAFETY: any bits are bf16, and there is memory for a line at each point.
                    unsafe {
                        let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
                        let point = to.start.add((row * 4 + column) * to.between + at);
                        _mm512_storeu_si512(point.cast(), _mm512_permutexvar_epi16(pairs, both));
                    }
                }
            }
        }
    }
}
