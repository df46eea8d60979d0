//! Formats in which adapter files change the layers of a network. A format sees one tensor of the network at a time, and
//! what the file holds for that layer; names, files and networks are not its matter.

mod lora;

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::Error;
use crate::layers::Worker;
use crate::registry::Registry;

/// How one format changes a tensor.
pub(in crate::model) type Merge = dyn for<'a> Worker<MergeTask<'a>, Output = Tensor>;

/// One format. A layer of a file is of the first format in [`ADAPTERS`] one of whose `marks` is among its parts.
pub(in crate::model) struct Format {
    /// Parts that no format before it has.
    pub(in crate::model) marks: &'static [&'static str],
    /// Every part that it reads; others of the layer are skipped, and so told.
    pub(in crate::model) parts: &'static [&'static str],
    pub(in crate::model) merge: &'static Merge,
}

/// Formats, the more special before the more general.
pub(in crate::model) static ADAPTERS: Registry<Format> = Registry::new("adapter format", &[("lora", &lora::FORMAT)]);

/// A tensor of the network, and what a file holds for the layer that it belongs to.
pub(in crate::model) struct MergeTask<'a> {
    /// diffusers' name of the layer, for messages.
    pub(in crate::model) layer: &'a str,
    /// `weight` or `bias`.
    pub(in crate::model) tensor: &'static str,
    /// The tensor as it is so far, in f32 and as files lay it: `[O, I]`, `[O, C, K, K]` or `[C]`. Formats that were merged
    /// before have changed it.
    pub(in crate::model) base: &'a Tensor,
    pub(in crate::model) parts: &'a Parts,
    /// Times which the change counts.
    pub(in crate::model) strength: f64,
}

/// What a file holds for one layer, in f32 on the network's device, by names that all writers share: what other
/// programs call `lora_A.weight`, `lora.down.weight` or `lora_linear_layer.down.weight` is `lora_down.weight` here.
pub(in crate::model) type Parts = BTreeMap<String, Tensor>;

/// Says of an adapter's tensors that they do not fit the layer. Whoever knows the file puts its name before it.
fn misfit(layer: &str, message: impl Into<String>) -> Error {
    Error::ModelUnsupported { name: layer.to_owned(), message: message.into() }
}
