//! One adapter of a request, and the report about it in the result.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::part::Part;

/// Most adapters of one request.
pub const MOST: usize = 32;

/// An adapter file and its strengths.
#[derive(Clone, Debug)]
pub struct LoraChoice {
    pub file: Arc<ComponentFile>,
    /// The request field that names it, for messages.
    pub field: String,
    pub unet: f64,
    pub text_encoder: f64,
    pub text_encoder_2: f64,
    /// Factors on `unet` by block; a layer takes the factor of the longest block name that it begins with.
    pub blocks: BTreeMap<String, f64>,
}

/// The report about one adapter file.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct LoraFacts {
    /// `lora`, whatever its format.
    pub kind: &'static str,
    /// As the request named it.
    pub model: String,
    /// Formats of its layers.
    pub formats: Vec<&'static str>,
    /// Networks that it changes: `unet`, `text_encoder`, `text_encoder_2`.
    pub components: Vec<&'static str>,
    /// Tensors of the file that were applied.
    pub applied: usize,
    /// Tensors of the file that were skipped.
    pub skipped: usize,
    /// The first of the skipped ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skipped_keys: Vec<String>,
    /// Milliseconds that this request spent on it; few where the changed network was in memory.
    pub ms: f64,
}

impl LoraChoice {
    /// The strength for a layer of `part`.
    pub(crate) fn strength(&self, part: Part, layer: &str) -> f64 {
        match part {
            Part::Unet => {
                let holds = |block: &str| {
                    layer.strip_prefix(block).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                };
                let block = self.blocks.iter().filter(|(block, _)| holds(block)).max_by_key(|(block, _)| block.len());
                self.unet * block.map_or(1.0, |(_, weight)| *weight)
            }
            Part::TextEncoder => self.text_encoder,
            Part::TextEncoder2 => self.text_encoder_2,
            Part::Vae => 0.0,
        }
    }
}
