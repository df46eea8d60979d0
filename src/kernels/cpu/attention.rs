//! Attention in blocks of queries and keys with a running softmax: Dao et al. 2022, <https://arxiv.org/abs/2205.14135>.
//! Scores exist one block at a time, in f32.

use std::ops::Range;

use super::element::Element;
use super::pool::{Scratch, Shared, at_least, for_each, threads, with_scratch};
use super::product::{Operand, Sums, multiply};
use super::simd;
use crate::kernels::Mask;

/// Queries of a block, at most.
const QUERIES: usize = 192;
/// Keys of a block.
const KEYS: usize = 384;

/// `[B, L, heads · D]` with unit stride in the last axis.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a, T> {
    pub(super) numbers: &'a [T],
    pub(super) sample_stride: usize,
    pub(super) token_stride: usize,
}

#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) batch: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) heads: usize,
    /// `D`
    pub(super) depth: usize,
}

struct Attention<'a, T> {
    q: Tokens<'a, T>,
    k: Tokens<'a, T>,
    v: Tokens<'a, T>,
    size: Size,
    mask: Mask,
}

/// Gives `[B, Lq, heads · D]`.
pub(super) fn attention<T: Element>(q: Tokens<T>, k: Tokens<T>, v: Tokens<T>, size: Size, mask: Mask) -> Vec<T> {
    let Size { batch, queries, keys, heads, depth } = size;
    let mut out = T::zeros(batch * queries * heads * depth);
    if keys == 0 || out.is_empty() {
        return out;
    }
    let pairs = batch * heads;
    let wanted = (4 * threads()).div_ceil(pairs).min(queries.div_ceil(32));
    let blocks = queries.div_ceil(QUERIES).max(wanted);
    let block = queries.div_ceil(blocks);
    let blocks = queries.div_ceil(block);
    let work = Attention { q, k, v, size, mask };
    let shared = Shared::new(&mut out);
    for_each(pairs * blocks, 2 * pairs * queries * keys * depth, |task| {
        let (pair, start) = (task / blocks, (task % blocks) * block);
        let rows = start..(start + block).min(queries);
        with_scratch(|scratch| work.block(pair / heads, pair % heads, rows, &shared, scratch));
    });
    out
}

impl<T: Element> Tokens<'_, T> {
    /// Tokens `range` of one head as f32, with the distance between them: where they stand, or widened into `block`.
    fn head<'s>(
        &'s self,
        at: usize,
        range: Range<usize>,
        depth: usize,
        block: &'s mut Vec<f32>,
    ) -> (*const f32, usize) {
        let start = at + range.start * self.token_stride;
        if T::IS_F32 {
            return (self.numbers[start..].as_ptr().cast(), self.token_stride);
        }
        let block = at_least(block, range.len() * depth);
        for (i, line) in block.chunks_exact_mut(depth).enumerate() {
            let start = start + i * self.token_stride;
            simd::widen_slice(&self.numbers[start..start + depth], line);
        }
        (block.as_ptr(), depth)
    }
}

impl<T: Element> Attention<'_, T> {
    /// One head of one sample, queries `rows`.
    #[expect(unsafe_code, reason = "rows of a result that is shared with other tasks")]
    fn block(&self, sample: usize, head: usize, rows: Range<usize>, out: &Shared<T>, scratch: &mut Scratch) {
        let Size { queries, keys, heads, depth, .. } = self.size;
        let count = rows.len();
        let Scratch { rows: wide_q, panel: wide_kv, values: scores, sums } = scratch;
        let at = |tokens: &Tokens<T>| sample * tokens.sample_stride + head * depth;
        let (q, q_stride) = self.q.head(at(&self.q), rows.clone(), depth, wide_q);
        let scores = at_least(scores, count * KEYS.min(keys));
        let (sums, rest) = at_least(sums, count * (depth + 2)).split_at_mut(count * depth); // [rows, D]
        let (greatest, totals) = rest.split_at_mut(count);
        greatest.fill(f32::NEG_INFINITY);
        totals.fill(0.0);

        let end = match self.mask {
            Mask::None => keys,
            Mask::Causal => keys.min(rows.end),
        };
        for first in (0..end).step_by(KEYS) {
            let width = KEYS.min(end - first);
            let (k, k_stride) = self.k.head(at(&self.k), first..first + width, depth, wide_kv);
            multiply(
                Operand { start: k, lines: width, stride: k_stride, step: 1 },
                Operand { start: q, lines: count, stride: q_stride, step: 1 },
                depth,
                Sums {
                    start: scores.as_mut_ptr(),
                    stride: width,
                    add: false,
                    factor: (1.0 / (depth as f64).sqrt()) as f32,
                },
            );
            for (i, line) in scores.chunks_exact_mut(width).take(count).enumerate() {
                let seen = match self.mask {
                    Mask::None => width,
                    Mask::Causal => (rows.start + i + 1).saturating_sub(first).min(width),
                };
                let (seen, hidden) = line.split_at_mut(seen);
                hidden.fill(0.0);
                if seen.is_empty() {
                    continue;
                }
                let before = greatest[i];
                let now = before.max(simd::greatest(seen));
                let total = simd::exponentials(seen, now);
                if first > 0 && now > before {
                    let shrink = (before - now).exp();
                    totals[i] *= shrink;
                    simd::scale(&mut sums[i * depth..(i + 1) * depth], shrink);
                }
                totals[i] += total;
                greatest[i] = now;
            }
            let (v, v_stride) = self.v.head(at(&self.v), first..first + width, depth, wide_kv);
            multiply(
                Operand { start: v, lines: depth, stride: 1, step: v_stride },
                Operand { start: scores.as_ptr(), lines: count, stride: width, step: 1 },
                width,
                Sums { start: sums.as_mut_ptr(), stride: depth, add: first > 0, factor: 1.0 },
            );
        }
        for (i, row) in rows.enumerate() {
            let target = out.at(((sample * queries + row) * heads + head) * depth);
            // SAFETY: this head of query `row` belongs to this task, and lies within the result.
            let target = unsafe { std::slice::from_raw_parts_mut(target, depth) };
            simd::round_scaled(&sums[i * depth..(i + 1) * depth], 1.0 / totals[i], target);
        }
    }
}
