//! From token ids to embeddings: the hidden states of both encoders, concatenated, and the pooled state of the second.
//!
//! Legend: `N` chunks of a text, `L` positions (77), `C` width of an encoder, `P` pooled width.

use candle_core::{D, Device, Result as CandleResult, Tensor};

use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::emphasis::{TextStates, apply_weights, masked_fragments};
use crate::conditioning::workers::prompt_chunks::ChunkedText;
use crate::context::Context;
use crate::error::{Error, Result, StageContext};
use crate::layers::Worker;
use crate::model::managers::TextEncoders;
use crate::model::networks::clip::{ClipInput, ClipRow, ClipTextModel};
use crate::units::Bytes;

const STAGE: &str = "text encoder";
/// Rows of one encoder pass: few enough to fit in memory and to notice cancellation between passes.
const ROWS_PER_PASS: usize = 64;

/// The embeddings of one text.
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
pub(crate) struct EncodeTexts;

pub(crate) struct EncodeTextsTask<'a> {
    pub(crate) encoders: &'a TextEncoders,
    pub(crate) device: &'a Device,
    /// Texts with the same number of chunks.
    pub(crate) texts: &'a [&'a TokenizedText],
    /// Layers skipped before the penultimate one.
    pub(crate) skip: usize,
    pub(crate) weighting: PromptWeighting,
    /// The ids of an empty chunk for each encoder.
    pub(crate) empty: &'a [Vec<u32>; 2],
    /// `[V, C]` for each encoder: the vectors behind ids from `FIRST_VECTOR` on.
    pub(crate) vectors: &'a [Option<Tensor>; 2],
}

/// A text for each encoder; empty for a missing first encoder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenizedText {
    pub(crate) by_encoder: [ChunkedText; 2],
}

/// The states and the pooled state of one text from one encoder: `[N·L, C]` and `[1, P]`.
type EncoderOutput = (Tensor, Option<Tensor>);

/// One encoder with its inputs.
struct EncoderPass<'a> {
    encoder: &'a ClipTextModel,
    texts: Vec<&'a ChunkedText>,
    empty: &'a [u32],
    vectors: Option<&'a Tensor>,
}

impl EncoderPass<'_> {
    /// One output for each text.
    fn run(&self, task: &EncodeTextsTask, ctx: &Context) -> Result<Vec<EncoderOutput>> {
        let rows = self.rows(task.weighting);
        let (mut hidden, mut pooled) = (Vec::new(), Vec::new());
        for rows in rows.chunks(ROWS_PER_PASS) {
            ctx.checkpoint()?;
            let input = ClipInput { rows, skip: task.skip, vectors: self.vectors, device: task.device };
            let output = self.encoder.encode(input)?;
            hidden.push(output.hidden);
            pooled.extend(output.pooled);
        }
        self.outputs(&hidden, &pooled, task.weighting).stage(STAGE)
    }

    /// The chunks of all texts, the empty chunk if the weighting needs it, and the chunks with masked fragments.
    fn rows(&self, weighting: PromptWeighting) -> Vec<ClipRow<'_>> {
        let row = |ids, hidden| ClipRow { ids, hidden };
        let chunks = self.texts.iter().flat_map(|text| &text.chunks);
        let mut rows: Vec<ClipRow> = chunks.map(|chunk| row(&chunk.ids, 0..0)).collect();
        if self.needs_empty(weighting) {
            rows.push(row(self.empty, 0..0));
        }
        for text in &self.texts {
            for (index, fragment) in masked_fragments(text, weighting) {
                let Some(chunk) = text.chunks.get(index) else { continue };
                let first = chunk.downweighted.iter().position(|&f| f == fragment).unwrap_or(0);
                let last = chunk.downweighted.iter().rposition(|&f| f == fragment).unwrap_or(0);
                rows.push(row(&chunk.ids, first..last + 1));
            }
        }
        rows
    }

    fn needs_empty(&self, weighting: PromptWeighting) -> bool {
        matches!(weighting, PromptWeighting::Comfy | PromptWeighting::Compel)
            && self.texts.iter().any(|text| text.is_weighted())
    }

    /// Splits the batches that [`Self::rows`] gave into texts, and applies their weights.
    fn outputs(
        &self,
        hidden: &[Tensor],
        pooled: &[Tensor],
        weighting: PromptWeighting,
    ) -> CandleResult<Vec<EncoderOutput>> {
        let rows = |batch: &Tensor| batch.dims().first().copied().unwrap_or(0);
        let split = hidden.iter().flat_map(|batch| (0..rows(batch)).map(|row| batch.narrow(0, row, 1)?.squeeze(0)));
        let states = split.collect::<CandleResult<Vec<Tensor>>>()?;
        let pooled = if pooled.is_empty() { None } else { Some(Tensor::cat(pooled, 0)?) };
        let chunks: usize = self.texts.iter().map(|text| text.chunks.len()).sum();
        let needs_empty = self.needs_empty(weighting);
        let empty = states.get(chunks).filter(|_| needs_empty);
        let (mut chunk, mut masked) = (0, chunks + usize::from(needs_empty));
        let mut outputs = Vec::with_capacity(self.texts.len());
        for text in &self.texts {
            let next_chunk = chunk + text.chunks.len();
            let next_masked = masked + masked_fragments(text, weighting).len();
            let part = |from: usize, to: usize| states.get(from..to).unwrap_or_default();
            let own = TextStates { chunks: part(chunk, next_chunk), empty, masked: part(masked, next_masked) };
            let context = Tensor::cat(&apply_weights(text, weighting, &own)?, 0)?; // [N·L, C]
            // The pooled state is the first chunk's, without weights.
            let pooled = pooled.as_ref().map(|pooled| pooled.narrow(0, chunk, 1)?.copy()).transpose()?;
            outputs.push((context, pooled));
            (chunk, masked) = (next_chunk, next_masked);
        }
        Ok(outputs)
    }
}

impl Worker<EncodeTextsTask<'_>> for EncodeTexts {
    type Output = Vec<Embeddings>;

    /// One [`Embeddings`] a text.
    ///
    /// # Errors
    /// `invalid_parameter` for a `clip_skip` beyond the encoder's layers; those of the device.
    fn run(&self, task: EncodeTextsTask, ctx: &Context) -> Result<Vec<Embeddings>> {
        let [empty, empty_2] = task.empty;
        let [vectors, vectors_2] = task.vectors;
        let texts = |encoder: usize| task.texts.iter().filter_map(|text| text.by_encoder.get(encoder)).collect();
        let first = task.encoders.first.as_ref();
        let first = first.map(|encoder| EncoderPass { encoder, texts: texts(0), empty, vectors: vectors.as_ref() });
        let first = first.map(|pass| pass.run(&task, ctx)).transpose()?.unwrap_or_default();
        let (encoder, vectors) = (&task.encoders.second, vectors_2.as_ref());
        let second = EncoderPass { encoder, texts: texts(1), empty: empty_2, vectors }.run(&task, ctx)?;
        let embeddings = |(index, (states, pooled)): (usize, EncoderOutput)| {
            let missing = || Error::bug("the second text encoder was loaded without its projection");
            let context = match first.get(index) {
                Some((first, _)) => Tensor::cat(&[first, &states], D::Minus1).stage(STAGE)?,
                None => states,
            };
            Ok(Embeddings { context: context.unsqueeze(0).stage(STAGE)?, pooled: pooled.ok_or_else(missing)? })
        };
        second.into_iter().enumerate().map(embeddings).collect()
    }
}
