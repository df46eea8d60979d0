//! How the weights of a prompt act on the states of a text encoder.
//!
//! Legend: `z` states of a chunk, `w` weights of its positions, `∅` the states of a chunk without text; `L` positions,
//! `C` width.
//!
//! - `a1111`: `z · w`, times what restores the mean of all of `z` (`modules/sd_emphasis.py`, `EmphasisOriginal`).
//! - `comfy`: `∅ + (z − ∅) · w` (`comfy/sd1_clip.py`).
//! - `compel`: the same, and then for each fragment of weight `w` below 1 a mean with the states of the text in which
//!   nothing sees that fragment, in which they count tan((1 − w) π/2) against 1 (`embeddings_provider.py`, masking).

use candle_core::{DType, Device, Result as CandleResult, Tensor};

use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::prompt::{Row, Side};

/// What `compel` takes a weight for that is not above 0, as the tangent has no end there.
const LEAST: f64 = 1e-5;

/// The states that the weights of one text need.
pub(crate) struct States<'a> {
    /// `[L, C]` for each chunk.
    pub(crate) chunks: &'a [Tensor],
    /// `[L, C]`: of the chunk without text. `None` where the weighting needs none.
    pub(crate) empty: Option<&'a Tensor>,
    /// `[L, C]` for each chunk and fragment that [`masked`] names, in its order.
    pub(crate) masked: &'a [Tensor],
}

/// The chunks and fragments of less than full weight whose states are needed with the fragment masked.
pub(crate) fn masked(side: &Side, weighting: PromptWeighting) -> Vec<(usize, u32)> {
    if weighting != PromptWeighting::Compel {
        return Vec::new();
    }
    let mut all = Vec::new();
    for (chunk, row) in side.rows.iter().enumerate() {
        let mut here: Vec<u32> = row.lessened.iter().copied().filter(|&fragment| fragment > 0).collect();
        here.dedup();
        all.extend(here.into_iter().map(|fragment| (chunk, fragment)));
    }
    all
}

/// `[L, C]` for each chunk, in the dtype of the states.
pub(crate) fn weigh(side: &Side, weighting: PromptWeighting, states: &States) -> CandleResult<Vec<Tensor>> {
    if !side.is_weighted() || weighting == PromptWeighting::None {
        return Ok(states.chunks.to_vec());
    }
    let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let empty = states.empty.map(wide).transpose()?;
    let masked = masked(side, weighting);
    let mut weighted = Vec::with_capacity(states.chunks.len());
    for (at, (z, row)) in states.chunks.iter().zip(&side.rows).enumerate() {
        let narrow = |t: Tensor| t.to_dtype(z.dtype())?.to_device(z.device());
        let weights = Tensor::from_slice(&row.weights, (row.weights.len(), 1), &Device::Cpu)?; // [L, 1]
        let plain = wide(z)?;
        let made = match (weighting, &empty) {
            (PromptWeighting::Comfy | PromptWeighting::Compel, Some(empty)) => {
                let from_empty = |z: &Tensor| (z - empty)?.broadcast_mul(&weights)? + empty;
                let mut sum = from_empty(&plain)?;
                if weighting == PromptWeighting::Compel {
                    let base = sum.clone();
                    let mut total = 1.0;
                    for fragment in fragments(side) {
                        let place = masked.iter().position(|&pair| pair == (at, fragment));
                        let without = place.and_then(|place| states.masked.get(place));
                        let without = without.map(|z| from_empty(&wide(z)?)).transpose()?;
                        let share = share(side, fragment);
                        sum = (sum + (without.as_ref().unwrap_or(&base) * share)?)?;
                        total += share;
                    }
                    sum = (sum / total)?;
                }
                sum
            }
            _ => restored(&plain, row, &weights)?,
        };
        weighted.push(narrow(made)?);
    }
    Ok(weighted)
}

fn restored(z: &Tensor, row: &Row, weights: &Tensor) -> CandleResult<Tensor> {
    if row.weights.iter().all(|&weight| weight == 1.0) {
        return Ok(z.clone());
    }
    let mean = |z: &Tensor| z.mean_all()?.to_scalar::<f64>();
    let weighted = z.broadcast_mul(weights)?;
    let factor = mean(z)? / mean(&weighted)?;
    // A mean of nothing cannot be restored.
    if factor.is_finite() { weighted * factor } else { Ok(weighted) }
}

/// The fragments of less than full weight that have tokens.
fn fragments(side: &Side) -> Vec<u32> {
    let mut all: Vec<u32> = side.rows.iter().flat_map(|row| &row.lessened).copied().filter(|&f| f > 0).collect();
    all.dedup();
    // One that a chunk's end divides appears twice, with padding between.
    all.sort_unstable();
    all.dedup();
    all
}

fn share(side: &Side, fragment: u32) -> f64 {
    let weight = (fragment as usize).checked_sub(1).and_then(|at| side.lessened.get(at)).copied().unwrap_or(1.0);
    ((1.0 - weight.max(LEAST)) * std::f64::consts::FRAC_PI_2).tan()
}
