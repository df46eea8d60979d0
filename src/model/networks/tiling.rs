//! Processes feature maps a few rows at a time. The result equals that of the whole map: a norm's
//! statistics are gathered from all strips before any is normalised, and a strip includes the rows around it that its
//! convolutions read. The price: everything before a norm is computed again after it.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels.

use std::ops::Range;

use candle_core::{Result as CandleResult, Tensor};

use crate::error::{Error, Result, StageContext as _};
use crate::kernels::{GroupNorm, Statistics};
use crate::model::networks::check::Check;

/// Computes rows of a feature map, `[B, rows, W, C]`.
pub(crate) type RowSource<'a> = &'a dyn Fn(&Range<usize>) -> CandleResult<Tensor>;

/// The strips of a map, and the check between them.
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    /// Rows of the map.
    pub(crate) height: usize,
    /// Upper limit of a strip's rows.
    pub(crate) rows: usize,
    pub(crate) stage: &'static str,
    pub(crate) check: Check<'a>,
}

impl Strips<'_> {
    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.height).step_by(self.rows.max(1)).map(move |start| start..(start + self.rows.max(1)).min(self.height))
    }

    /// `rows` and up to `by` rows on either side, within the map.
    pub(crate) fn around(self, rows: &Range<usize>, by: usize) -> Range<usize> {
        rows.start.saturating_sub(by)..(rows.end + by).min(self.height)
    }

    /// Statistics of the whole map for `norm`.
    pub(crate) fn statistics(self, norm: &GroupNorm, source: RowSource) -> Result<Statistics> {
        let mut all: Option<Statistics> = None;
        for rows in self.ranges() {
            (self.check)()?;
            let part = norm.statistics(&source(&rows).stage(self.stage)?).stage(self.stage)?;
            match &mut all {
                Some(all) => all.merge(&part),
                None => all = Some(part),
            }
        }
        all.ok_or_else(|| Error::bug("statistics of a feature map without rows"))
    }

    /// The whole map.
    pub(crate) fn gather(self, source: RowSource) -> Result<Tensor> {
        let mut whole: Option<Tensor> = None;
        for rows in self.ranges() {
            (self.check)()?;
            let mut put = || -> CandleResult<()> {
                let part = source(&rows)?.contiguous()?;
                let (batch, _, width, channels) = part.dims4()?;
                let whole = match &whole {
                    Some(whole) => whole,
                    None => {
                        whole.insert(Tensor::zeros((batch, self.height, width, channels), part.dtype(), part.device())?)
                    }
                };
                whole.slice_set(&part, 1, rows.start)
            };
            put().stage(self.stage)?;
        }
        whole.ok_or_else(|| Error::bug("a feature map without rows"))
    }
}

/// Rows `wanted` of `x`, which holds rows `has`.
pub(crate) fn cut(x: &Tensor, has: &Range<usize>, wanted: &Range<usize>) -> CandleResult<Tensor> {
    x.narrow(1, wanted.start - has.start, wanted.len())?.contiguous()
}
