//! From token ids to embeddings: the hidden states of both encoders side by side, and the pooled state of the second.
//!
//! Legend: `T` texts, `N` chunks of each, `L` positions (77), `C` width of an encoder, `P` pooled width.

use candle_core::{D, Device, Tensor};

use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::emphasis::{States, masked as masked_rows, weigh};
use crate::conditioning::workers::prompt::Side;
use crate::context::Context;
use crate::error::{Error, Result, StageContext};
use crate::layers::Worker;
use crate::model::managers::TextEncoders;
use crate::model::networks::clip::{ClipInput, ClipRow, ClipTextModel};
use crate::units::Bytes;

const STAGE: &str = "text encoder";
/// Rows that an encoder reads at once: few enough for the memory, and for a request to be cancelled between.
const ROWS: usize = 64;

/// What the UNet is told of one text.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// `[1, N·L, C₁+C₂]`, for cross-attention.
    pub context: Tensor,
    /// `[1, P]`, for the added conditioning.
    pub pooled: Tensor,
}

impl Embeddings {
    pub(crate) fn bytes(&self) -> Bytes {
        let bytes = |t: &Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
        Bytes(bytes(&self.context) + bytes(&self.pooled))
    }

    /// Zeros of the same shapes.
    pub(crate) fn zeros(&self) -> Result<Self> {
        let zeros = |t: &Tensor| t.zeros_like().stage(STAGE);
        Ok(Self { context: zeros(&self.context)?, pooled: zeros(&self.pooled)? })
    }
}

/// Runs the text encoders.
pub(crate) struct Encode;

pub(crate) struct EncodeTask<'a> {
    pub(crate) encoders: &'a TextEncoders,
    pub(crate) device: &'a Device,
    /// All with the same number of rows.
    pub(crate) texts: &'a [&'a EncodeText],
    /// Layers left out before the penultimate one.
    pub(crate) skip: usize,
    pub(crate) weighting: PromptWeighting,
    /// The ids of a row without text.
    pub(crate) empty: &'a [Vec<u32>; 2],
    /// `[V, C]` for each encoder: what ids from `FIRST_VECTOR` on stand for.
    pub(crate) vectors: &'a [Option<Tensor>; 2],
}

/// A text for each encoder; nothing for the first where there is none.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EncodeText {
    pub(crate) sides: [Side; 2],
}

/// One encoder, and what it is given.
struct One<'a> {
    encoder: &'a ClipTextModel,
    sides: Vec<&'a Side>,
    empty: &'a [u32],
    vectors: Option<&'a Tensor>,
}

impl One<'_> {
    /// For each text `[N·L, C]` and, where the encoder has it, `[1, P]`.
    fn run(&self, task: &EncodeTask, ctx: &Context) -> Result<Vec<(Tensor, Option<Tensor>)>> {
        let row = |ids, hidden| ClipRow { ids, hidden };
        let plain = self.sides.iter().flat_map(|side| &side.rows).map(|one| row(&one.ids, 0..0));
        let mut rows: Vec<ClipRow> = plain.collect();
        let texts = rows.len();
        let weighted = self.sides.iter().any(|side| side.is_weighted());
        let from_empty = matches!(task.weighting, PromptWeighting::Comfy | PromptWeighting::Compel);
        if weighted && from_empty {
            rows.push(row(self.empty, 0..0));
        }
        let masked = rows.len();
        for side in &self.sides {
            for (chunk, fragment) in masked_rows(side, task.weighting) {
                let Some(one) = side.rows.get(chunk) else { continue };
                let first = one.lessened.iter().position(|&f| f == fragment).unwrap_or(0);
                let last = one.lessened.iter().rposition(|&f| f == fragment).unwrap_or(0);
                rows.push(row(&one.ids, first..last + 1));
            }
        }
        let (mut hidden, mut pooled) = (Vec::new(), Vec::new());
        for rows in rows.chunks(ROWS) {
            ctx.checkpoint()?;
            let input = ClipInput { rows, skip: task.skip, vectors: self.vectors, device: task.device };
            let output = self.encoder.encode(input)?;
            hidden.push(output.hidden);
            pooled.extend(output.pooled);
        }
        let split = || {
            let one = |batch: &Tensor, i| batch.narrow(0, i, 1)?.squeeze(0);
            let each = hidden
                .iter()
                .flat_map(|batch| (0..batch.dims().first().copied().unwrap_or(0)).map(move |i| one(batch, i)));
            let states = each.collect::<candle_core::Result<Vec<Tensor>>>()?;
            let pooled = if pooled.is_empty() { None } else { Some(Tensor::cat(&pooled, 0)?) };
            let empty = states.get(texts).filter(|_| masked > texts);
            let (mut start, mut more) = (0, masked);
            let mut all = Vec::with_capacity(self.sides.len());
            for side in &self.sides {
                let (end, until) = (start + side.rows.len(), more + masked_rows(side, task.weighting).len());
                let part = |from: usize, to: usize| states.get(from..to).unwrap_or_default();
                let told = States { chunks: part(start, end), empty, masked: part(more, until) };
                let context = Tensor::cat(&weigh(side, task.weighting, &told)?, 0)?; // [N·L, C]
                // Of the first chunk, and without weights.
                let pooled = pooled.as_ref().map(|pooled| pooled.narrow(0, start, 1)?.copy()).transpose()?;
                all.push((context, pooled));
                (start, more) = (end, until);
            }
            Ok(all)
        };
        split().stage(STAGE)
    }
}

impl Worker<EncodeTask<'_>> for Encode {
    type Output = Vec<Embeddings>;

    /// One [`Embeddings`] a text.
    ///
    /// # Errors
    /// `invalid_parameter` for a `clip_skip` beyond the encoder's layers; those of the device.
    fn run(&self, task: EncodeTask, ctx: &Context) -> Result<Vec<Embeddings>> {
        let [empty, empty_2] = task.empty;
        let [vectors, vectors_2] = task.vectors;
        let sides = |place: usize| task.texts.iter().filter_map(|text| text.sides.get(place)).collect();
        let first = task
            .encoders
            .first
            .as_ref()
            .map(|encoder| One { encoder, sides: sides(0), empty, vectors: vectors.as_ref() }.run(&task, ctx));
        let first = first.transpose()?.unwrap_or_default();
        let (encoder, vectors) = (&task.encoders.second, vectors_2.as_ref());
        let second = One { encoder, sides: sides(1), empty: empty_2, vectors }.run(&task, ctx)?;
        let one = |(place, (states, pooled)): (usize, (Tensor, Option<Tensor>))| {
            let missing = || Error::bug("the second text encoder was loaded without its projection");
            let context = match first.get(place) {
                Some((first, _)) => Tensor::cat(&[first, &states], D::Minus1).stage(STAGE)?,
                None => states,
            };
            Ok(Embeddings { context: context.unsqueeze(0).stage(STAGE)?, pooled: pooled.ok_or_else(missing)? })
        };
        second.into_iter().enumerate().map(one).collect()
    }
}
