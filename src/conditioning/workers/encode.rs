//! From token ids to embeddings: the hidden states of both encoders side by side, and the pooled state of the second.
//!
//! Legend: `T` texts, `N` chunks of each, `L` positions (77), `C` width of an encoder, `P` pooled width.

use candle_core::{D, Device, Tensor};

use crate::context::Context;
use crate::error::{Error, Result, Stage};
use crate::layers::Worker;
use crate::model::managers::TextEncoders;
use crate::model::networks::clip::{ClipOutput, ClipTextModel};
use crate::units::Bytes;

const STAGE: &str = "text encoder";

/// What the UNet is told of one text.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// `[1, N·L, C₁+C₂]`, for cross-attention.
    pub context: Tensor,
    /// `[1, P]`, for the added conditioning.
    pub pooled: Tensor,
}

impl Embeddings {
    pub(in crate::conditioning) fn bytes(&self) -> Bytes {
        let bytes = |t: &Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
        Bytes(bytes(&self.context) + bytes(&self.pooled))
    }

    /// Zeros of the same shapes.
    pub(in crate::conditioning) fn zeros(&self) -> Result<Self> {
        let zeros = |t: &Tensor| t.zeros_like().stage(STAGE);
        Ok(Self { context: zeros(&self.context)?, pooled: zeros(&self.pooled)? })
    }
}

/// Runs the text encoders.
pub(in crate::conditioning) struct Encode;

/// Texts of the same number of rows.
pub(in crate::conditioning) struct EncodeTask<'a> {
    pub(in crate::conditioning) encoders: &'a TextEncoders,
    pub(in crate::conditioning) device: &'a Device,
    pub(in crate::conditioning) texts: &'a [EncodeText],
    /// Layers left out before the penultimate one.
    pub(in crate::conditioning) skip: usize,
}

/// Rows of token ids for each encoder.
pub(in crate::conditioning) struct EncodeText {
    pub(in crate::conditioning) first: Vec<Vec<u32>>,
    pub(in crate::conditioning) second: Vec<Vec<u32>>,
}

impl Worker<EncodeTask<'_>> for Encode {
    type Output = Vec<Embeddings>;

    /// One [`Embeddings`] a text.
    ///
    /// # Errors
    /// `invalid_parameter` for a `clip_skip` beyond the encoder's layers; those of the device.
    fn run(&self, task: EncodeTask, ctx: &Context) -> Result<Vec<Embeddings>> {
        let EncodeTask { encoders, device, texts, skip } = task;
        let encode = |encoder: &ClipTextModel, rows: Vec<&Vec<u32>>| -> Result<ClipOutput> {
            ctx.checkpoint()?;
            let positions = rows.first().map_or(0, |row| row.len());
            let ids: Vec<u32> = rows.iter().copied().flatten().copied().collect();
            let ids = Tensor::from_vec(ids, (rows.len(), positions), device).stage(STAGE)?; // [T·N, L]
            encoder.forward(&ids, skip)
        };
        let first = encoders.first.as_ref();
        let first = first.map(|encoder| encode(encoder, texts.iter().flat_map(|text| &text.first).collect()));
        let second = encode(&encoders.second, texts.iter().flat_map(|text| &text.second).collect())?;
        let pooled =
            second.pooled.ok_or_else(|| Error::bug("the second text encoder was loaded without its projection"))?;
        let split = || {
            let hidden = match first.transpose()? {
                Some(first) => Tensor::cat(&[&first.hidden, &second.hidden], D::Minus1).stage(STAGE)?,
                None => second.hidden,
            }; // [T·N, L, C₁+C₂]
            let (mut start, mut all) = (0, Vec::with_capacity(texts.len()));
            for text in texts {
                let chunks = text.second.len();
                let one = || {
                    let context = hidden.narrow(0, start, chunks)?.flatten(0, 1)?.unsqueeze(0)?; // [1, N·L, C₁+C₂]
                    let pooled = pooled.narrow(0, start, 1)?; // [1, P]: of the first chunk
                    Ok(Embeddings { context: context.copy()?, pooled: pooled.copy()? })
                };
                all.push(one().stage(STAGE)?);
                start += chunks;
            }
            Ok(all)
        };
        split()
    }
}
