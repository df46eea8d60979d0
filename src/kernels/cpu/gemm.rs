//! Matrix products in tiles. A task is a block of rows times some panels of weights: for each step of the depth the rows
//! are packed into a block that the second-level cache holds, then every panel, which the first-level cache holds, is
//! multiplied with all of them, a few rows at a time. The epilogue is applied to each tile while it is in the cache.
//!
//! Legend: `rows` positions, `depth` the axis that is summed over, `outputs` columns of the result.

use std::ops::Range;

use candle_core::Result;

use crate::kernels::cpu::aligned::AlignedBuffer;
use crate::kernels::cpu::element::Element;
use crate::kernels::cpu::epilogue::{
    EpilogueTensors, FusedEpilogue, TileRegion, dequantize_tile, write_gated_tile, write_tile,
};
use crate::kernels::cpu::micro::MicroKernel;
use crate::kernels::cpu::micro::tile::{A_BYTES, Operands, PANEL, TileCall};
use crate::kernels::cpu::packed::{PackedWeight, PanelSource};
use crate::kernels::cpu::parallel::{OutputTiles, for_each, threads};
use crate::kernels::cpu::prefetch::prefetch;
use crate::kernels::cpu::quantize::QuantizedActivations;
use crate::kernels::cpu::row_block::{LeftOperand, ROW_F32S, RowBlock};
use crate::kernels::cpu::scratch::{Scratch, with_scratch};

/// Rows of a task, at most.
const MAX_ROWS: usize = 512;
/// Panels of a task, at most. More panels mean that rows are packed less often; their sums overflow the second-level cache,
/// but are read only once for each step of the depth.
const MAX_PANELS: usize = 20;
/// f32 numbers summed in one chain. Several short chains lose fewer digits than a long one, and at this length no more than
/// torch's products and convolutions do. bf16 has lost them already.
pub(crate) const F32_CHAIN: usize = 128;
/// Multiplications worth a task of their own.
const TASK_OPERATIONS: usize = 1 << 19;

/// A product `left · weightᵀ`.
pub(crate) struct GemmTask<'a, L> {
    pub(crate) left: &'a L,
    pub(crate) weight: &'a PackedWeight,
    pub(crate) rows: usize,
    pub(crate) epilogue: &'a EpilogueTensors<'a>,
    /// The activations that `left` reads, if the weights are bytes.
    pub(crate) quantized: Option<&'a QuantizedActivations>,
}

struct Gemm<'a, L, T> {
    left: &'a L,
    weight: &'a PackedWeight,
    panels: PanelSource<'a>,
    micro: MicroKernel,
    depth: usize,
    /// Numbers of the depth in one step; a multiple of 32.
    depth_step: usize,
    /// Columns of the result.
    outputs: usize,
    gated: bool,
    quantized: Option<&'a QuantizedActivations>,
    epilogue: FusedEpilogue<'a, T>,
}

/// Returns `[rows, outputs]`; a gated product has half as many outputs as the weight.
#[expect(unsafe_code, reason = "tiles of one result are written by several threads")]
pub(crate) fn gemm<T: Element, L: LeftOperand>(task: &GemmTask<L>) -> Result<Vec<T>> {
    let &GemmTask { left, weight, rows, epilogue, quantized } = task;
    let (gated, depth) = (epilogue.gated, weight.depth());
    let outputs = if gated { weight.outputs() / 2 } else { weight.outputs() };
    let micro = quantized.map_or_else(|| MicroKernel::new(!T::IS_F32 && weight.is_bf16()), |left| left.micro);
    let longest = if T::IS_F32 && quantized.is_none() { F32_CHAIN } else { A_BYTES / micro.operands.size() };
    let depth_step = depth.div_ceil(depth.div_ceil(longest).max(1)).next_multiple_of(micro.depth_multiple.max(32));
    let guard = weight.guard();
    let panels = PanelSource::new(weight, guard.as_ref())?;
    let epilogue = FusedEpilogue::new(epilogue, outputs)?;
    let gemm = Gemm { left, weight, panels, micro, depth, depth_step, outputs, gated, quantized, epilogue };

    let panels = outputs.div_ceil(PANEL);
    let max_panels = if gated { MAX_PANELS / 2 } else { MAX_PANELS };
    let (row_block, panel_block) = task_size((rows, depth, panels), max_panels, micro.rows);
    let (down, across) = (rows.div_ceil(row_block), panels.div_ceil(panel_block));
    let mut out = Box::new_uninit_slice(rows * outputs);
    // SAFETY: every task writes its own rows of its own columns, each line once.
    let tiles = unsafe { OutputTiles::new(&mut out) };
    for_each(down * across, rows * depth * outputs, |task| {
        let (row, panel) = ((task % down) * row_block, (task / down) * panel_block);
        let rows = row..(row + row_block).min(rows);
        let panels = panel..(panel + panel_block).min(panels);
        with_scratch(|scratch| gemm.run_task(rows, panels, tiles, scratch));
    });
    // SAFETY: the tasks cover all rows and columns.
    Ok(unsafe { out.assume_init() }.into_vec())
}

/// Rows and panels of a task, chosen so that every thread has some and none waits long for the last.
fn task_size((rows, depth, panels): (usize, usize, usize), max_panels: usize, tile_rows: usize) -> (usize, usize) {
    let threads = threads();
    let wanted = (rows * depth * panels * PANEL / TASK_OPERATIONS).clamp(1, 2 * threads);
    let mut across = panels.div_ceil(max_panels);
    let mut down = rows.div_ceil(MAX_ROWS);
    // Rows are packed again for each part of the outputs, weights are read again for each part of the rows.
    if down * across < wanted && panels * PANEL > rows {
        across = wanted.div_ceil(down).min(panels).max(across);
    }
    if down * across < wanted {
        down = wanted.div_ceil(across).min(rows.div_ceil(2 * tile_rows)).max(down);
    }
    if down * across < wanted {
        across = wanted.div_ceil(down).min(panels).max(across);
    }
    if down > 1 && across % threads != 0 {
        down = down.next_multiple_of(threads);
    } else if down == 1 {
        across = balanced_parts(panels, across, threads);
    }
    (rows.div_ceil(down).next_multiple_of(tile_rows), panels.div_ceil(across).max(1))
}

/// The number of parts of `panels`, at least `parts`, that gives the busiest thread the least work.
fn balanced_parts(panels: usize, parts: usize, threads: usize) -> usize {
    let longest = |parts: usize| panels.div_ceil(parts.max(1)) * parts.div_ceil(threads);
    (parts..=(parts + threads).min(panels.max(parts))).min_by_key(|parts| longest(*parts)).unwrap_or(parts)
}

/// The rows of a task and its scratch memory.
struct TaskMemory<'a> {
    rows: Range<usize>,
    block: RowBlock<'a>,
    panel: &'a mut AlignedBuffer,
}

/// One step of the depth.
#[derive(Clone, Copy)]
struct DepthStep {
    start: usize,
    end: usize,
    /// Numbers that the micro-kernel sums over: the step, padded with zeros.
    padded: usize,
}

/// One panel, and the panel and depth that follow it and are prefetched meanwhile.
struct PanelTask {
    panel: usize,
    step: DepthStep,
    next_panel: usize,
    next_depth: Range<usize>,
}

impl<L: LeftOperand, T: Element> Gemm<'_, L, T> {
    /// Computes the outputs of `panels` for `rows`.
    fn run_task(&self, rows: Range<usize>, panels: Range<usize>, out: OutputTiles<T>, scratch: &mut Scratch) {
        let Scratch { rows: block, panel, sums, .. } = scratch;
        let padded_rows = rows.len().next_multiple_of(self.micro.rows);
        let per_panel = self.lanes() * padded_rows * PANEL;
        // With one step, the sums of a panel are written before the next panel begins.
        let panels_kept = if self.depth <= self.depth_step { 1 } else { panels.len() };
        let sums = sums.scratch::<f32>(panels_kept * per_panel);
        let block = RowBlock::new(block.scratch(padded_rows * ROW_F32S), self.micro.operands);
        let mut memory = TaskMemory { rows, block, panel };
        self.micro.on_thread(|| {
            let mut start = 0;
            loop {
                let step = self.pack_rows(start, &mut memory);
                for (i, panel) in panels.clone().enumerate() {
                    let is_last = i + 1 == panels.len();
                    let (next_panel, from) = if is_last { (panels.start, step.end) } else { (panel + 1, start) };
                    let next_depth = from..(from + self.depth_step).min(self.depth);
                    let task = PanelTask { panel, step, next_panel, next_depth };
                    let sums = &mut sums[(i % panels_kept) * per_panel..][..per_panel];
                    self.multiply_panel(&task, &mut memory, sums, out);
                }
                start = step.end;
                if start >= self.depth {
                    break;
                }
            }
        });
    }

    /// Panels that are computed together: one, or the panel of the values and the panel of their gates.
    fn lanes(&self) -> usize {
        if self.gated { 2 } else { 1 }
    }

    /// Packs the rows of a task for the step that begins at `start`.
    fn pack_rows(&self, start: usize, memory: &mut TaskMemory) -> DepthStep {
        let end = (start + self.depth_step).min(self.depth);
        let padded = (end - start).next_multiple_of(self.micro.depth_multiple);
        self.left.pack(memory.rows.clone(), start..end, &mut memory.block);
        if padded > end - start {
            (0..memory.rows.len()).for_each(|row| memory.block.clear(row, end - start, start + padded - end));
        }
        DepthStep { start, end, padded }
    }

    /// Adds one step to the sums of one panel, `[lanes, padded rows, 32]`, and writes the result after the last step.
    #[expect(unsafe_code, reason = "micro-kernels take pointers")]
    #[inline]
    fn multiply_panel(&self, task: &PanelTask, memory: &mut TaskMemory, sums: &mut [f32], out: OutputTiles<T>) {
        let (panel, step) = (task.panel, task.step);
        let tile_rows = self.micro.rows;
        let (lanes, is_last) = (self.lanes(), step.end == self.depth);
        let (rows, column) = (&memory.rows, panel * PANEL);
        let columns = PANEL.min(self.outputs - column);
        let tile = sums.len() / lanes;
        for lane in 0..lanes {
            let gates = lane * (self.outputs / PANEL);
            let (next, parts) = (task.next_panel + gates, rows.len().div_ceil(tile_rows));
            let mut ahead = self.panels.prefetch(next, task.next_depth.clone(), parts);
            let depth = step.start..step.start + step.padded;
            let b = self.panels.panel(self.micro.operands, panel + gates, depth, memory.panel).as_ptr();
            for first in (0..rows.len()).step_by(tile_rows) {
                let count = tile_rows.min(rows.len() - first);
                let region = TileRegion { row: rows.start + first, rows: count, column, columns };
                let c = sums[lane * tile + first * PANEL..].as_mut_ptr();
                let a = memory.block.rows_from(first);
                ahead.next_part();
                if step.start > 0 {
                    prefetch(c.cast::<u8>().cast_const(), count * PANEL * size_of::<f32>());
                }
                if is_last {
                    self.epilogue.prefetch(region, out);
                }
                let call = TileCall { a, b, depth: step.padded, c, rows: count, add: step.start > 0 };
                // SAFETY: the block and the sums have a whole number of tiles of rows; the panel is padded to a multiple
                // of 32 numbers.
                unsafe { self.micro.run(&call) }
                if is_last && lane + 1 == lanes {
                    let (values, last) = sums.split_at_mut(lane * tile);
                    let range = first * PANEL..(first + count) * PANEL;
                    self.write(values.get_mut(range.clone()), &mut last[range], region, out);
                }
            }
        }
    }

    /// Writes a tile of finished sums; a gated product has `values` for the gates `sums`.
    fn write(&self, values: Option<&mut [f32]>, sums: &mut [f32], region: TileRegion, out: OutputTiles<T>) {
        let panel = region.column / PANEL;
        match values {
            Some(values) if self.gated => {
                self.dequantize(panel, values, region.row);
                self.dequantize(panel + self.outputs / PANEL, sums, region.row);
                write_gated_tile(&self.epilogue, values, sums, region, out);
            }
            _ => {
                self.dequantize(panel, sums, region.row);
                write_tile(&self.epilogue, sums, region, out);
            }
        }
    }

    /// Converts sums of bytes to numbers in place; f32 sums stay as they are.
    fn dequantize(&self, panel: usize, sums: &mut [f32], row: usize) {
        if let (Some(left), Some((scales, offsets))) = (self.quantized, self.weight.dequantization(panel)) {
            let unsigned = self.micro.operands == Operands::U8;
            dequantize_tile(sums, left, row, scales, if unsigned { offsets } else { &[0; PANEL] });
        }
    }
}
