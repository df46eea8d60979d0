//! Applies the weights of a prompt to the states of a text encoder.
//!
//! Legend: `z` states of a chunk, `w` weights of its positions, `∅` states of the empty chunk; `L` positions, `C` width.
//!
//! - `a1111`: `z · w`, scaled so that the mean of `z` is unchanged (`modules/sd_emphasis.py`, `EmphasisOriginal`).
//! - `comfy`: `∅ + (z − ∅) · w` (`comfy/sd1_clip.py`).
//! - `compel`: the same, and then for each fragment of weight `w` below 1 a weighted mean with the states of the text
//!   with that fragment masked, whose weight is tan((1 − w) π/2) against 1 (`embeddings_provider.py`).

use candle_core::{DType, Device, Result as CandleResult, Tensor};

use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::prompt_chunks::{ChunkedText, TokenChunk};

/// The weight that `compel` uses for weights of 0 and below, because the tangent is infinite there.
const MIN_WEIGHT: f64 = 1e-5;

/// The states that the weighting of one text needs.
pub(crate) struct TextStates<'a> {
    /// `[L, C]` for each chunk.
    pub(crate) chunks: &'a [Tensor],
    /// `[L, C]`: the empty chunk. `None` for weightings without it.
    pub(crate) empty: Option<&'a Tensor>,
    /// `[L, C]` for each of [`masked_fragments`], in that order.
    pub(crate) masked: &'a [Tensor],
}

/// The chunks and downweighted fragments whose states are needed with the fragment masked.
pub(crate) fn masked_fragments(text: &ChunkedText, weighting: PromptWeighting) -> Vec<(usize, u32)> {
    if weighting != PromptWeighting::Compel {
        return Vec::new();
    }
    let mut all = Vec::new();
    for (index, chunk) in text.chunks.iter().enumerate() {
        let mut fragments: Vec<u32> = chunk.downweighted.iter().copied().filter(|&fragment| fragment > 0).collect();
        fragments.dedup();
        all.extend(fragments.into_iter().map(|fragment| (index, fragment)));
    }
    all
}

/// `[L, C]` for each chunk, in the dtype of the states.
pub(crate) fn apply_weights(
    text: &ChunkedText,
    weighting: PromptWeighting,
    states: &TextStates,
) -> CandleResult<Vec<Tensor>> {
    if !text.is_weighted() || weighting == PromptWeighting::None {
        return Ok(states.chunks.to_vec());
    }
    let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let empty = states.empty.map(wide).transpose()?;
    let masked = masked_fragments(text, weighting);
    let mut weighted = Vec::with_capacity(states.chunks.len());
    for (index, (z, chunk)) in states.chunks.iter().zip(&text.chunks).enumerate() {
        let narrow = |t: Tensor| t.to_dtype(z.dtype())?.to_device(z.device());
        let weights = Tensor::from_slice(&chunk.weights, (chunk.weights.len(), 1), &Device::Cpu)?; // [L, 1]
        let z = wide(z)?;
        let applied = match (weighting, &empty) {
            (PromptWeighting::Comfy | PromptWeighting::Compel, Some(empty)) => {
                let from_empty = |z: &Tensor| (z - empty)?.broadcast_mul(&weights)? + empty;
                let mut sum = from_empty(&z)?;
                if weighting == PromptWeighting::Compel {
                    let base = sum.clone();
                    let mut total = 1.0;
                    for fragment in downweighted_fragments(text) {
                        let position = masked.iter().position(|&pair| pair == (index, fragment));
                        let without = position.and_then(|position| states.masked.get(position));
                        let without = without.map(|z| from_empty(&wide(z)?)).transpose()?;
                        let share = masked_share(text, fragment);
                        sum = (sum + (without.as_ref().unwrap_or(&base) * share)?)?;
                        total += share;
                    }
                    sum = (sum / total)?;
                }
                sum
            }
            _ => with_restored_mean(&z, chunk, &weights)?,
        };
        weighted.push(narrow(applied)?);
    }
    Ok(weighted)
}

fn with_restored_mean(z: &Tensor, chunk: &TokenChunk, weights: &Tensor) -> CandleResult<Tensor> {
    if chunk.weights.iter().all(|&weight| weight == 1.0) {
        return Ok(z.clone());
    }
    let mean = |z: &Tensor| z.mean_all()?.to_scalar::<f64>();
    let weighted = z.broadcast_mul(weights)?;
    let factor = mean(z)? / mean(&weighted)?;
    // A mean of 0 cannot be restored.
    if factor.is_finite() { weighted * factor } else { Ok(weighted) }
}

/// The downweighted fragments that have tokens.
fn downweighted_fragments(text: &ChunkedText) -> Vec<u32> {
    let all = text.chunks.iter().flat_map(|chunk| &chunk.downweighted).copied();
    let mut all: Vec<u32> = all.filter(|&fragment| fragment > 0).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn masked_share(text: &ChunkedText, fragment: u32) -> f64 {
    let weight = (fragment as usize).checked_sub(1).and_then(|index| text.downweighted.get(index));
    let weight = weight.copied().unwrap_or(1.0);
    ((1.0 - weight.max(MIN_WEIGHT)) * std::f64::consts::FRAC_PI_2).tan()
}
