//! Formats in which adapter files change the layers of a network. A format sees one tensor of the network at a time, and
//! what the file holds for that layer; names, files and networks are not its matter.
//!
//! Legend: `O` `I` outputs and inputs of the layer, `K` kernel side, 1 for linear layers, `R` rank, `s` strength.

pub(crate) mod added;
pub(crate) mod boft;
pub(crate) mod dora;
#[cfg(test)]
pub(crate) mod formulas;
pub(crate) mod glora;
#[cfg(test)]
pub(crate) mod hostile;
pub(crate) mod ia3;
pub(crate) mod loha;
pub(crate) mod lokr;
pub(crate) mod lora;
pub(crate) mod oft;
pub(crate) mod task;

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::Error;
use crate::layers::Worker;
use crate::registry::Registry;

pub(crate) use task::MergeTask;

/// How one format changes a tensor.
pub(crate) type Merge = dyn for<'a> Worker<MergeTask<'a>, Output = Tensor>;

/// One format. What a file changes of a layer is found by [`of`].
pub(crate) struct Format {
    /// Parts of which any tells that the layer's `weight` is changed in this format. No other format has them.
    pub(crate) marks: &'static [&'static str],
    /// The same of its `bias`; empty where the format changes none.
    pub(crate) bias_marks: &'static [&'static str],
    /// Every part that it reads; others of the layer are skipped, and so told.
    pub(crate) parts: &'static [&'static str],
    pub(crate) merge: &'static Merge,
}

/// Formats, the more special before the more general.
pub(crate) static ADAPTERS: Registry<Format> = Registry::new(
    "adapter format",
    &[
        ("lora", &lora::FORMAT),
        ("loha", &loha::FORMAT),
        ("lokr", &lokr::FORMAT),
        ("oft", &oft::FORMAT),
        ("glora", &glora::FORMAT),
        ("ia3", &ia3::FORMAT),
        ("full", &added::FULL),
        ("norm", &added::NORM),
    ],
);

/// What a file holds for one layer, in f32 on the network's device, by names that all writers share: what other
/// programs call `lora_A.weight`, `lora.down.weight` or `lora_linear_layer.down.weight` is `lora_down.weight` here,
/// `lora_B.bias` is `lora_up.bias`, and PEFT's `lora_magnitude_vector`, with or without `.weight` behind it, is
/// `lora_magnitude_vector`.
pub(crate) type Parts = BTreeMap<String, Tensor>;

/// The format in which a file changes `tensor` (`weight` or `bias`) of a layer of which it has the parts that `has`
/// knows; `None` where it does not change it. A layer's weight and bias may be changed in different formats.
pub(crate) fn of(tensor: &str, has: impl Fn(&str) -> bool) -> Option<(&'static str, &'static Format)> {
    ADAPTERS.iter().find(|(_, format)| {
        let marks = if tensor == "bias" { format.bias_marks } else { format.marks };
        marks.iter().any(|mark| has(mark))
    })
}

/// Numbers that one part of an adapter has at most for a tensor of these sides. Who reads adapters asks this before
/// reading: a header may claim anything.
pub(crate) fn part_limit(base: &[usize]) -> usize {
    // Ranks up to the layer's width, and at least those that people train however small the layer is.
    match base {
        [] | [_] => base.iter().product(),
        [outputs, inputs, kernel @ ..] => {
            let width = (*outputs).max(*inputs).max(512);
            kernel.iter().fold(width.saturating_mul(width), |product, &side| product.saturating_mul(side))
        }
    }
}

/// Says of an adapter's tensors that they do not fit the layer. Whoever knows the file puts its name before it.
fn misfit(layer: &str, message: impl Into<String>) -> Error {
    Error::ModelUnsupported { name: layer.to_owned(), message: message.into() }
}
