//! The shape of an adapter format: the keys that identify it, and the worker that merges it.

use candle_core::Tensor;

use crate::layers::Worker;
use crate::model::lora::formats::task::MergeTask;

/// Merges one format's change into a tensor.
pub type Merge = dyn for<'a> Worker<MergeTask<'a>, Output = Tensor>;

/// One adapter format; [`super::detect`] finds the format of a layer's tensors.
pub struct AdapterFormat {
    /// Parts of which any one identifies a change of the layer's `weight` in this format; no other format has them.
    pub marks: &'static [&'static str],
    /// The same for the layer's `bias`; empty if the format never changes biases.
    pub bias_marks: &'static [&'static str],
    /// Every part that the format reads; the report lists any other part of the layer as skipped.
    pub parts: &'static [&'static str],
    pub merge: &'static Merge,
}
