//! Convolutions of 3×3 by minimal filtering, F(2×2, 3×3) (Winograd 1980; Lavin & Gray 2016): a tile of 2×2 results takes
//! 16 products per channel instead of 36, for a few additions before and after. The additions are made in f32; if the
//! products are of bf16, their operands are rounded to bf16 once more, which costs no more than the rounding of the result.
//! AMX multiplies so fast that the additions would take longer than the products they save.
//!
//! Legend: a *tile* is 2×2 positions of the result; a *point* is one of the 16 products of a tile.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{Result, bail};
use rayon::prelude::{IndexedParallelIterator, ParallelSliceMut};

use crate::kernels::conv_shape::{ConvShape, Padding};
use crate::kernels::cpu::aligned::{CACHE_LINE, UninitBuffer};
use crate::kernels::cpu::dequantize::EncodedRows;
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::epilogue::{EpilogueTensors, FusedEpilogue, TileRegion, write_tile};
use crate::kernels::cpu::gemm::F32_CHAIN;
use crate::kernels::cpu::micro::MicroKernel;
use crate::kernels::cpu::micro::tile::{A_BYTES, Operands, PANEL, TileCall};
use crate::kernels::cpu::packed::PackedWeight;
use crate::kernels::cpu::parallel::{OutputTiles, for_each, for_each_part, threads};
use crate::kernels::cpu::prefetch::prefetch;
use crate::kernels::cpu::row_block::ROW_F32S;
use crate::kernels::cpu::scratch::{Scratch, with_scratch};
use crate::kernels::cpu::simd::{self, multiversion};
use crate::kernels::cpu::transpose::WORD;

/// Products of a tile for one channel.
const POINTS: usize = 16;
/// Channels whose filters are transformed at a time; the channels are a multiple of it.
const CHANNEL_BLOCK: usize = 32;

/// Bytes of filters that are transformed at a time, about. They fit the last-level cache, and the filters of a whole layer,
/// which are 16/9 of its weights, never take memory.
const FILTER_BYTES: usize = 16 << 20;

/// Positions of a sample below which the transformation of the filters costs more than it saves.
const MIN_POSITIONS: usize = 256;

/// Block sizes that were measured to be fastest.
#[derive(Clone, Copy)]
struct Tuning {
    /// Channels that are summed at a time, at most.
    chain: usize,
    /// Panels of a task, at most.
    panels: usize,
    /// The bytes that a task keeps in the second-level cache.
    cache: usize,
}

impl Tuning {
    fn of(operands: Operands) -> Self {
        match operands {
            Operands::Bf16 => Self { chain: 256, panels: 5, cache: 1 << 20 },
            _ => Self { chain: F32_CHAIN, panels: 4, cache: 5 << 18 },
        }
    }
}

/// True if [`convolve`] computes convolutions of this shape and is faster for feature maps that are not small. With `bf16`
/// weights and activations are bf16.
pub(crate) fn supports(shape: ConvShape, bf16: bool) -> bool {
    let same = shape.kernel == 3 && shape.stride == 1 && shape.padding == Padding::same(1);
    let inputs_fit = shape.inputs >= 2 * CHANNEL_BLOCK && shape.inputs.is_multiple_of(CHANNEL_BLOCK);
    let on_amx = MicroKernel::new(bf16).operands == Operands::Bf16 && simd::level() == simd::SimdLevel::Amx;
    same && inputs_fit && shape.outputs >= 2 * PANEL && !on_amx
}

/// True if [`convolve`] is to compute a convolution with this weight for feature maps of `height` and `width`.
pub(crate) fn supports_weight<T: Element>(
    weight: &PackedWeight,
    shape: ConvShape,
    (height, width): (usize, usize),
) -> bool {
    let bf16 = !T::IS_F32 && weight.is_bf16();
    let is_stored = weight.guard().is_some() && weight.outputs() == shape.outputs && weight.depth() == 9 * shape.inputs;
    is_stored && supports(shape, bf16) && height * width >= MIN_POSITIONS
}

/// A convolution that [`supports_weight`] accepted.
pub(crate) struct WinogradTask<'a, T> {
    /// `[B, H, W, C]`
    pub(crate) numbers: &'a [T],
    pub(crate) batch: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) weight: &'a PackedWeight,
    pub(crate) epilogue: &'a EpilogueTensors<'a>,
}

struct Convolution<'a, T> {
    /// `[B, H, W, C]`
    numbers: &'a [T],
    height: usize,
    width: usize,
    channels: usize,
    /// Tiles of a column and of a row.
    tiles: (usize, usize),
    /// The transformed filters of some panels, `[panels, C / chain, 16, chain, 32]`, the last chain shorter if `C` is no
    /// multiple; bf16 in pairs of channels, as in a panel of weights.
    filters: UninitBuffer,
    /// The panels of `filters`.
    transformed: Range<usize>,
    outputs: usize,
    micro: MicroKernel,
    chain: usize,
    epilogue: FusedEpilogue<'a, T>,
}

/// The division of all tiles and panels into tasks.
struct TaskGrid {
    /// Tiles of the whole batch.
    tiles: usize,
    /// Parts of the tiles.
    parts: usize,
    /// Tiles that the micro-kernel computes at once, and how many such units there are.
    unit: usize,
    units: usize,
    /// Panels of a task.
    panels: usize,
}

impl TaskGrid {
    fn new<T>(convolution: &Convolution<T>, tiles: usize) -> Self {
        let &Convolution { outputs, channels, chain, micro, .. } = convolution;
        let tuning = Tuning::of(micro.operands);
        let all_panels = outputs.div_ceil(PANEL);
        let panels = all_panels.div_ceil(all_panels.div_ceil(tuning.panels));
        // The share of a tile: the transformed pixels of one chain, and the sums of every panel that waits for more.
        let panels_kept = if chain < channels { panels } else { 1 };
        let tile_bytes = POINTS * (chain * micro.operands.size() + panels_kept * PANEL * size_of::<f32>());
        let unit = micro.rows;
        let max_units = (tuning.cache / tile_bytes / unit).max(1);
        let units = tiles.div_ceil(unit);
        let parts = units.div_ceil(max_units).next_multiple_of(threads()).min(units).max(1);
        Self { tiles, parts, unit, units, panels }
    }

    /// The tiles of a part. Parts differ by one unit at most.
    fn part(&self, part: usize) -> Range<usize> {
        let start = |part: usize| (part * self.units / self.parts * self.unit).min(self.tiles);
        start(part)..start(part + 1)
    }
}

/// Returns `[batch, height, width, outputs]`.
#[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
pub(crate) fn convolve<T: Element>(task: &WinogradTask<T>) -> Result<Vec<T>> {
    let &WinogradTask { numbers, batch, height, width, weight, epilogue } = task;
    let (outputs, channels) = (weight.outputs(), weight.depth() / 9);
    let epilogue = FusedEpilogue::new(epilogue, outputs)?;
    let tiles = (height.div_ceil(2), width.div_ceil(2));
    let micro = MicroKernel::new(!T::IS_F32 && weight.is_bf16());
    let longest = Tuning::of(micro.operands).chain;
    let chain = channels.div_ceil(channels.div_ceil(longest)).next_multiple_of(CHANNEL_BLOCK);
    let guard = weight.guard();
    let Some(rows) = guard.as_ref().map(|guard| weight.rows(guard)).transpose()?.flatten() else {
        bail!("the weights of a Winograd convolution must be in the order of the file");
    };

    let filters = UninitBuffer::default();
    let transformed = 0..0;
    let mut convolution =
        Convolution { numbers, height, width, channels, tiles, filters, transformed, outputs, micro, chain, epilogue };
    let grid = TaskGrid::new(&convolution, batch * tiles.0 * tiles.1);
    let panels = outputs.div_ceil(PANEL);
    let panel_bytes = POINTS * channels * PANEL * micro.operands.size();
    let panels_at_a_time = (FILTER_BYTES / (grid.panels * panel_bytes)).max(1) * grid.panels;
    convolution.filters = UninitBuffer::new(panels_at_a_time.min(panels) * panel_bytes);

    let mut out = Box::new_uninit_slice(batch * height * width * outputs);
    // SAFETY: every task writes the positions of its own tiles in its own columns, each line once.
    let result = unsafe { OutputTiles::new(&mut out) };
    for first in (0..panels).step_by(panels_at_a_time) {
        convolution.transformed = first..(first + panels_at_a_time).min(panels);
        convolution.transform_weights(&rows);
        let count = convolution.transformed.len();
        for_each(grid.parts * count.div_ceil(grid.panels), grid.tiles * channels * count * PANEL, |task| {
            let (part, panel) = (task % grid.parts, first + (task / grid.parts) * grid.panels);
            let panels = panel..(panel + grid.panels).min(convolution.transformed.end);
            with_scratch(|scratch| convolution.run_task(grid.part(part), panels, result, scratch));
        });
    }
    // SAFETY: the tasks cover all positions and columns.
    Ok(unsafe { out.assume_init() }.into_vec())
}

/// The four points of one column of three weights.
#[inline(always)]
fn filter_points(a: f32, b: f32, c: f32) -> [f32; 4] {
    let (ends, middle) = (0.5 * (a + c), 0.5 * b);
    [a, ends + middle, ends - middle, c]
}

/// The four points of one column of four pixels.
#[inline(always)]
fn pixel_points([a, b, c, d]: [f32; 4]) -> [f32; 4] {
    [a - c, b + c, c - b, b - d]
}

/// The two results of one column of four points.
#[inline(always)]
fn tile_results([a, b, c, d]: [f32; 4]) -> [f32; 2] {
    [a + b + c, b - c - d]
}

const LANES: usize = 16;

multiversion! {
    /// Transforms the filters of a panel; `taps` is `[channels, 9, 32]`.
    fn transform_filters(taps: &[f32], to: PointBlock) {
        for (channel, taps) in taps.chunks_exact(9 * PANEL).enumerate() {
            for at in (0..PANEL).step_by(LANES) {
                let mut points = [[0.0; LANES]; POINTS];
                for lane in 0..LANES {
                    let tap = |row: usize, column: usize| taps[(row * 3 + column) * PANEL + at + lane];
                    let columns: [[f32; 4]; 3] =
                        std::array::from_fn(|column| filter_points(tap(0, column), tap(1, column), tap(2, column)));
                    for row in 0..4 {
                        let line = filter_points(columns[0][row], columns[1][row], columns[2][row]);
                        for column in 0..4 {
                            points[row * 4 + column][lane] = line[column];
                        }
                    }
                }
                for (point, numbers) in points.iter().enumerate() {
                    to.write(point, channel * PANEL + at, numbers);
                }
            }
        }
    }

    /// Transforms the 16 pixels of a tile, for as many channels as each of `pixels` has, a multiple of 16.
    fn transform_pixels<T>(pixels: [&[T]; POINTS], to: PointBlock) {
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
                    std::array::from_fn(|column| pixel_points(std::array::from_fn(|row| numbers[row * 4 + column][lane])));
                for row in 0..4 {
                    let line = pixel_points(std::array::from_fn(|column| columns[column][row]));
                    for column in 0..4 {
                        points[row * 4 + column][lane] = line[column];
                    }
                }
            }
            for (point, numbers) in points.iter().enumerate() {
                to.write(point, at, numbers);
            }
        }
    }

    /// Computes the four results of tiles: `sums` is `[16, stride, 32]`, of which tiles `first..` are taken, as many as
    /// `upper` has pairs; `upper` and `lower` are `[2 · tiles, 32]`.
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
                        tile_results(std::array::from_fn(|row| points[row * 4 + column][lane]))
                    });
                    for row in 0..2 {
                        let [left, right] = tile_results(std::array::from_fn(|column| columns[column][row]));
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

/// Memory of 16 points, `stride` bytes apart.
pub(crate) struct PointBlock<'a> {
    start: *mut u8,
    stride: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> PointBlock<'a> {
    /// The block that begins where `memory` does.
    ///
    /// # Safety
    /// Each of the 16 points, `stride` bytes apart, has memory for all numbers that are written to it.
    #[expect(unsafe_code, reason = "numbers are written without a check of their bounds")]
    unsafe fn new<N>(memory: &'a mut [N], stride: usize) -> Self {
        Self { start: memory.as_mut_ptr().cast(), stride, memory: PhantomData }
    }

    #[expect(unsafe_code, reason = "numbers are written without a check of their bounds")]
    #[inline(always)]
    fn write(&self, point: usize, at: usize, numbers: &[f32; LANES]) {
        let to = self.start.wrapping_add(point * self.stride + at * size_of::<f32>()).cast::<[f32; LANES]>();
        // SAFETY: the caller of `new` promises that there is memory for the numbers.
        unsafe { to.write_unaligned(*numbers) }
    }
}

impl<T: Element> Convolution<'_, T> {
    /// Bytes of one channel of one point of a panel.
    fn channel_bytes(&self) -> usize {
        PANEL * self.micro.operands.size()
    }

    /// Transforms the filters of the panels `transformed`, from weights `[outputs, channels, 9]`.
    #[expect(unsafe_code, reason = "filters are written by vector instructions")]
    fn transform_weights(&mut self, weight: &EncodedRows) {
        let (channels, chain, channel_bytes) = (self.channels, self.chain, self.channel_bytes());
        let (operands, panels) = (self.micro.operands, self.transformed.clone());
        let panel_words = POINTS * channels * channel_bytes / WORD;
        let parts = self.filters.as_mut_words().par_chunks_mut(panel_words).take(panels.len());
        for_each_part(parts, POINTS * panels.len() * channels * PANEL, |i, filters| {
            with_scratch(|Scratch { panel: packed, .. }| {
                for channel in (0..channels).step_by(CHANNEL_BLOCK) {
                    let first = channel / chain * chain;
                    let depth = chain.min(channels - first);
                    let start = (first * POINTS + channel - first) * channel_bytes / WORD;
                    // SAFETY: a chain has `depth` channels at each point, of which these are `CHANNEL_BLOCK`.
                    let to = unsafe { PointBlock::new(&mut filters[start..], depth * channel_bytes) };
                    let taps = 9 * channel..9 * (channel + CHANNEL_BLOCK);
                    let taps = weight.panel(operands, panels.start + i, taps, packed);
                    #[cfg(target_arch = "x86_64")]
                    if operands == Operands::Bf16 {
                        // SAFETY: a panel has 9 taps of `CHANNEL_BLOCK` channels, and `to` has memory for as many channels
                        // at each point; bf16 operands are chosen only with AVX-512 BF16.
                        unsafe { avx512::transform_filters(taps.as_ptr(), &to) };
                        continue;
                    }
                    // SAFETY: a panel has 32 numbers at each of these depths, aligned as the scratch memory is.
                    let taps =
                        unsafe { std::slice::from_raw_parts(taps.as_ptr().cast::<f32>(), 9 * CHANNEL_BLOCK * PANEL) };
                    transform_filters(taps, to);
                }
            });
        });
    }

    /// Transforms the pixels of `tiles`, one a row of `block`, for the channels `channels`. Points are `stride` bytes apart.
    #[expect(unsafe_code, reason = "points are written without a check of their bounds")]
    fn transform_tiles(&self, tiles: Range<usize>, channels: Range<usize>, block: &mut [f32], stride: usize) {
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
            // SAFETY: `block` has a row of [`A_STRIDE`](crate::kernels::cpu::micro::tile::A_STRIDE) bytes at each point.
            let to = unsafe { PointBlock::new(&mut block[line * ROW_F32S..], stride) };
            #[cfg(target_arch = "x86_64")]
            if self.micro.operands == Operands::Bf16 {
                // SAFETY: the numbers are bf16 if the operands are, and the processor has AVX-512 BF16; the slices have one
                // length, a multiple of 32, and a row of the block holds as many numbers.
                unsafe { avx512::transform_pixels(pixels.map(|pixel| pixel.as_ptr().cast()), channels.len(), &to) };
                continue;
            }
            transform_pixels(pixels, to);
        }
    }

    /// Computes the outputs of `panels` for `tiles`.
    fn run_task(&self, tiles: Range<usize>, panels: Range<usize>, out: OutputTiles<T>, scratch: &mut Scratch) {
        let Scratch { rows: block, values, sums, .. } = scratch;
        let padded = tiles.len().next_multiple_of(self.micro.rows);
        let block = block.scratch::<f32>(POINTS * padded * ROW_F32S);
        // With one chain, the sums of a panel are written before the next panel begins.
        let panels_kept = if self.chain < self.channels { panels.len() } else { 1 };
        let per_panel = POINTS * padded * PANEL;
        let sums = sums.scratch::<f32>(panels_kept * per_panel);
        let results = values.scratch::<f32>(4 * tiles.len() * PANEL);
        self.micro.on_thread(|| {
            for start in (0..self.channels).step_by(self.chain) {
                let channels = start..(start + self.chain).min(self.channels);
                let is_last = channels.end == self.channels;
                self.transform_tiles(tiles.clone(), channels.clone(), block, padded * ROW_F32S * size_of::<f32>());
                for (i, panel) in panels.clone().enumerate() {
                    let sums = &mut sums[(i % panels_kept) * per_panel..][..per_panel];
                    self.multiply_panel(panel, channels.clone(), tiles.len(), (block, sums));
                    if is_last {
                        self.write(sums, &tiles, panel * PANEL, results, out);
                    }
                }
            }
        });
    }

    /// Adds the products of one chain of channels to the sums of a panel, `[16, padded tiles, 32]`.
    #[expect(unsafe_code, reason = "micro-kernels take pointers")]
    #[inline]
    fn multiply_panel(&self, panel: usize, channels: Range<usize>, tiles: usize, (block, sums): (&[f32], &mut [f32])) {
        let unit = self.micro.rows;
        let padded = sums.len() / (POINTS * PANEL);
        let (depth, point_bytes) = (channels.len(), channels.len() * self.channel_bytes());
        let first_panel = (panel - self.transformed.start) * self.channels;
        let filters = &self.filters.as_slice()[(first_panel + channels.start) * POINTS * self.channel_bytes()..];
        for point in 0..POINTS {
            let b = filters[point * point_bytes..].as_ptr().cast::<u8>();
            // The filters of the next point are prefetched meanwhile, a part with each tile.
            let next = b.wrapping_add(point_bytes);
            let part = (point_bytes / (padded / unit)).next_multiple_of(CACHE_LINE);
            for first in (0..tiles).step_by(unit) {
                prefetch(next.wrapping_add(first / unit * part), part);
                let a = block[(point * padded + first) * ROW_F32S..].as_ptr().cast();
                let c = sums[(point * padded + first) * PANEL..].as_mut_ptr();
                let call = TileCall { a, b, depth, c, rows: unit.min(tiles - first), add: channels.start > 0 };
                // SAFETY: the block and the sums have a whole number of units of tiles at each point; the channels are a
                // multiple of the depth that f32 and bf16 operands need.
                unsafe { self.micro.run(&call) }
            }
        }
    }

    /// Writes the results of one panel: `sums` is `[16, padded tiles, 32]`.
    fn write(&self, sums: &[f32], tiles: &Range<usize>, column: usize, results: &mut [f32], out: OutputTiles<T>) {
        let padded = sums.len() / (POINTS * PANEL);
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
                    write_tile(&self.epilogue, results, TileRegion { row, rows, column, columns }, out);
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

    use super::{CHANNEL_BLOCK, PANEL, POINTS, PointBlock};

    /// Numbers of a vector of f32.
    const WIDTH: usize = 16;
    /// Bytes of a pair of numbers of each output of a panel.
    const LINE_OF_PAIRS: usize = PANEL * 2 * size_of::<bf16>();

    /// [`super::pixel_points`] of 16 numbers at a time.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pixel_points([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
        [_mm512_sub_ps(a, c), _mm512_add_ps(b, c), _mm512_sub_ps(c, b), _mm512_sub_ps(b, d)]
    }

    /// [`super::filter_points`] of 16 numbers at a time.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn filter_points([a, b, c]: [__m512; 3]) -> [__m512; 4] {
        let half = _mm512_set1_ps(0.5);
        let (ends, middle) = (_mm512_mul_ps(half, _mm512_add_ps(a, c)), _mm512_mul_ps(half, b));
        [a, _mm512_add_ps(ends, middle), _mm512_sub_ps(ends, middle), c]
    }

    /// Transforms the 16 pixels of a tile for `count` channels, a multiple of 16.
    ///
    /// # Safety
    /// Each pixel has `count` numbers, and `to` has memory for as many bf16 at each point.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(crate) unsafe fn transform_pixels(pixels: [*const bf16; POINTS], count: usize, to: &PointBlock) {
        for at in (0..count).step_by(WIDTH) {
            // SAFETY: each pixel has 16 numbers from `at` on.
            let number = |i: usize| unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(pixels[i].add(at).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            };
            let columns = [0, 1, 2, 3].map(|column| pixel_points([0, 4, 8, 12].map(|row| number(row + column))));
            for row in 0..4 {
                let line = pixel_points(columns.map(|column| column[row]));
                for (column, numbers) in line.into_iter().enumerate() {
                    // SAFETY: any bits are bf16, and each point has memory for 16 of them.
                    unsafe {
                        let narrow = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
                        let point = to.start.add((row * 4 + column) * to.stride + at * size_of::<bf16>());
                        _mm256_storeu_si256(point.cast(), narrow);
                    }
                }
            }
        }
    }

    /// Transforms the filters of [`CHANNEL_BLOCK`] channels of a panel. `taps` is `[channels, 9]` in pairs of bf16; the points
    /// are written in pairs of channels.
    ///
    /// # Safety
    /// `taps` has [`CHANNEL_BLOCK`] channels, and `to` has memory for as many at each point.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(crate) unsafe fn transform_filters(taps: *const u8, to: &PointBlock) {
        /// Interleaves the 16 numbers of the first half with those of the second.
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
        // SAFETY: the constant has 64 bytes.
        let pairs = unsafe { _mm512_loadu_si512(PAIRS.as_ptr().cast()) };
        // A line is 16 outputs of two channels.
        for line in 0..CHANNEL_BLOCK / 2 * PANEL / WIDTH {
            let at = line * size_of::<__m512i>();
            // Two channels are 18 numbers, so they begin with a pair.
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
                |first: usize| [0, 1, 2].map(|column| filter_points([0, 3, 6].map(|row| number(first + row + column))));
            let (evens, odds) = (columns(0), columns(9));
            for row in 0..4 {
                let even = filter_points(evens.map(|column| column[row]));
                let odd = filter_points(odds.map(|column| column[row]));
                for (column, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                    // SAFETY: any bits are bf16, and each point has memory for a line.
                    unsafe {
                        let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
                        let point = to.start.add((row * 4 + column) * to.stride + at);
                        _mm512_storeu_si512(point.cast(), _mm512_permutexvar_epi16(pairs, both));
                    }
                }
            }
        }
    }
}
