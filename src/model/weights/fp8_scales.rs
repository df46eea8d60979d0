//! Scales that files keep beside weights in eight-bit floats, each one number. A weight that misses its own is wrong by a
//! factor of hundreds, and nothing would say so: a file whose scales are not understood is refused.

use crate::error::{Error, Result};
use crate::kernels::Coding;
use crate::model::weights::open::{Stored, StoredDtype, Weights};

/// The ending of a weight's name, and that of its scale's.
const SCALES: [(&str, &str); 2] = [("weight", "scale_weight"), ("weight", "weight_scale")];
/// By which ComfyUI says that a network's weights have scales.
pub(crate) const MARK: &str = "scaled_fp8";

/// Names that the scale of a weight may have.
pub(crate) fn scales_of(weight: &str) -> impl Iterator<Item = String> {
    SCALES.iter().filter_map(move |(own, scale)| Some(format!("{}{scale}", weight.strip_suffix(own)?)))
}

/// The name of the weight whose scale this is, and the ending by which it is one.
pub(crate) fn scaled_by(scale: &str) -> Option<(String, &'static str)> {
    SCALES.iter().find_map(|(own, ending)| Some((format!("{}{own}", scale.strip_suffix(ending)?), *ending)))
}

/// Whether a tensor is a weight in eight-bit floats.
pub(crate) fn is_in_eight_bits(stored: &Stored) -> bool {
    matches!(stored.dtype, StoredDtype::Coded(Coding::E4m3 | Coding::E5m2))
}

/// Whether a name is of a scale of weights, be it understood or not.
fn is_scale(name: &str) -> bool {
    let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
    last.contains("scale") && last.contains("weight")
}

/// Whether every scale belongs to a weight that takes it. `marked` says whether the file has [`MARK`].
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
        // One that changes nothing may stand beside any weight.
        if weights.numbers(name, 1)?.as_deref() != Some(&[1.0]) {
            return refuse(format!("there is no weight in eight-bit floats that takes the scale `{name}`"));
        }
    }
    Ok(())
}
