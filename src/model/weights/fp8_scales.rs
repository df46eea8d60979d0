//! Scales of weights in eight-bit floats, each a tensor of one number. A weight without its scale would be wrong by a factor
//! of hundreds without any error, so files with unknown scales are refused.

use crate::error::{Error, Result};
use crate::kernels::Coding;
use crate::model::weights::open::{Stored, StoredDtype, Weights};

/// Endings of a weight's name and of its scale's.
const SCALES: [(&str, &str); 2] = [("weight", "scale_weight"), ("weight", "weight_scale")];
/// ComfyUI's tensor that marks a network whose weights have scales.
pub(crate) const MARK: &str = "scaled_fp8";

/// Possible names of a weight's scale.
pub(crate) fn scales_of(weight: &str) -> impl Iterator<Item = String> {
    SCALES.iter().filter_map(move |(own, scale)| Some(format!("{}{scale}", weight.strip_suffix(own)?)))
}

/// The name of the weight that a scale belongs to, and the scale's ending.
pub(crate) fn scaled_by(scale: &str) -> Option<(String, &'static str)> {
    SCALES.iter().find_map(|(own, ending)| Some((format!("{}{own}", scale.strip_suffix(ending)?), *ending)))
}

/// True if a tensor is a weight in eight-bit floats.
pub(crate) fn is_in_eight_bits(stored: &Stored) -> bool {
    matches!(stored.dtype, StoredDtype::Coded(Coding::E4m3 | Coding::E5m2))
}

/// True if a name is of a scale of weights, known or not.
fn is_scale(name: &str) -> bool {
    let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
    last.contains("scale") && last.contains("weight")
}

/// Every scale must belong to a weight in eight-bit floats. `marked` is true if the file has [`MARK`].
///
/// # Errors
/// `model_unsupported`.
pub(crate) fn check(weights: &Weights, marked: bool) -> Result<()> {
    let refuse = |message| Err(Error::ModelUnsupported { name: weights.path(0).display().to_string(), message });
    let takes = |scale: &str| {
        let weight = scaled_by(scale).and_then(|(weight, _)| weights.tensor(&weight));
        weight.is_some_and(|(_, stored)| is_in_eight_bits(stored))
    };
    let mut scales = weights.tensors().map(|(name, _)| name).filter(|name| is_scale(name)).peekable();
    let coded = |stored: &Stored| stored.shape.len() > 1 && is_in_eight_bits(stored);
    if marked && scales.peek().is_none() && weights.tensors().any(|(_, stored)| coded(stored)) {
        return refuse(format!(
            "tensor `{MARK}` says that weights have scales, and there are none that are understood"
        ));
    }
    for name in scales.filter(|name| !takes(name)) {
        // A scale of 1 may accompany any weight.
        if weights.numbers(name, 1)?.as_deref() != Some(&[1.0]) {
            return refuse(format!("there is no weight in eight-bit floats that takes the scale `{name}`"));
        }
    }
    Ok(())
}
