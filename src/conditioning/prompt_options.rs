//! The prompts of a request with everything that decides their embeddings.

use std::sync::Arc;

use crate::conditioning::interface::{EmbeddingRequest, PromptWeighting};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::lora::LoraStack;

#[derive(Clone, Debug, Default)]
pub struct PromptOptions {
    pub prompt: String,
    /// Prompt of the second encoder; the first prompt if missing or empty.
    pub prompt_2: Option<String>,
    pub negative_prompt: Option<String>,
    pub negative_prompt_2: Option<String>,
    /// Layers skipped before the penultimate one.
    pub clip_skip: Option<u32>,
    /// True if guidance above 1 needs the negative prompt.
    pub guided: bool,
    pub weighting: PromptWeighting,
    /// Number of steps, which prompt editing divides.
    pub steps: usize,
    /// A full chunk ends at a comma if that is at most this many tokens back; 0 ends it where it is full.
    pub backtrack: usize,
    pub embeddings: Vec<EmbeddingChoice>,
    /// LoRAs of the text encoders.
    pub adapters: Option<Arc<LoraStack>>,
    /// UNet samples of one image in the largest evaluation, counted by
    /// [`crate::conditioning::instructor::ConditioningInstructor::check`].
    pub passes: usize,
}

/// A textual inversion with its file.
#[derive(Clone, Debug)]
pub struct EmbeddingChoice {
    pub file: Arc<ComponentFile>,
    pub token: String,
}

impl EmbeddingChoice {
    /// The request for the same textual inversion.
    #[must_use]
    pub fn options(&self) -> EmbeddingRequest {
        EmbeddingRequest { name: self.file.name.clone(), token: Some(self.token.clone()) }
    }
}
