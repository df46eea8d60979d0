//! Adapter formats. A format merges its parts into one tensor of the network at a time; it knows neither keys, files nor
//! networks.
//!
//! Legend: `O` `I` outputs and inputs of the layer, `K` kernel side, 1 for linear layers, `R` rank, `s` strength.

pub(crate) mod added;
pub(crate) mod boft;
pub(crate) mod dora;
pub mod format;
pub(crate) mod glora;
pub(crate) mod ia3;
pub(crate) mod loha;
pub(crate) mod lokr;
pub(crate) mod lora;
pub(crate) mod oft;
pub mod task;

use crate::model::lora::formats::format::AdapterFormat;
use crate::registry::Registry;

/// The formats; a more specific one stands before a more general one.
pub static ADAPTERS: Registry<AdapterFormat> = Registry::new(
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

/// The format that changes `tensor` (`weight` or `bias`) of a layer, given the parts that the file has for it (`has`);
/// `None` if the file does not change the tensor. A layer's weight and bias may be changed in different formats.
pub fn detect(tensor: &str, has: impl Fn(&str) -> bool) -> Option<(&'static str, &'static AdapterFormat)> {
    ADAPTERS.iter().find(|(_, format)| {
        let marks = if tensor == "bias" { format.bias_marks } else { format.marks };
        marks.iter().any(|mark| has(mark))
    })
}
