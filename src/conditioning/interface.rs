//! What can be asked of the conditioning domain.

use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing};

/// The section `workers.instructors.conditioning` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether the embeddings of prompts are kept for the next request.
    pub cache_embeddings: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache_embeddings: true }
    }
}

/// How an image of other proportions is brought to a size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ResizeMode {
    /// Both sides to the size; proportions change.
    #[default]
    #[serde(alias = "Just Resize")]
    Stretch,
    /// The size is covered, and what reaches beyond is cut off on both sides.
    #[serde(alias = "Crop and Resize")]
    Crop,
    /// The whole image, in the middle, its edges repeated outwards.
    #[serde(alias = "Resize and Fill")]
    Fill,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What a prompt is to the UNet: its embeddings, as shapes and statistics.
    EncodePrompt(EncodeWish),
    /// The tokens of a text.
    Tokenize(TokenizeWish),
    /// Which conditioning there is.
    List(Nothing),
}

impl Request {
    /// Whether it must run where the weights are. What needs none is answered while an image is made.
    #[must_use]
    pub fn needs_compute(&self) -> bool {
        match self {
            Self::List(_) | Self::Tokenize(_) => false,
            Self::EncodePrompt(_) => true,
        }
    }
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EncodeWish {
    /// At most 2400 tokens; beyond 75 it is encoded in chunks of 75.
    pub prompt: String,
    /// Prompt of the second text encoder. Default: `prompt`.
    #[serde(default)]
    pub prompt_2: Option<String>,
    /// Left out: zeros where the checkpoint says so, the empty text otherwise.
    #[serde(default)]
    pub negative_prompt: Option<String>,
    /// Negative prompt of the second text encoder. Default: `negative_prompt`.
    #[serde(default)]
    pub negative_prompt_2: Option<String>,
    /// Layers of the text encoders left out for the prompt, from 0 (the default).
    #[serde(default)]
    pub clip_skip: Option<u32>,
    /// A name that `model.list` gives. Default: the default model.
    #[serde(default)]
    pub model: Option<String>,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct TokenizeWish {
    /// At most 64 KiB.
    pub text: String,
    /// A name that `model.list` gives. Default: the default model.
    #[serde(default)]
    pub model: Option<String>,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    EncodePrompt(EncodedPrompt),
    Tokenize(Tokenized),
    List(ConditioningList),
}

/// The answer to `encode_prompt`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct EncodedPrompt {
    pub model: String,
    pub positive: EmbeddingFacts,
    pub negative: EmbeddingFacts,
}

/// Embeddings in a few numbers.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct EmbeddingFacts {
    /// Batch, tokens, width.
    pub context_shape: Vec<usize>,
    pub context_mean: f64,
    pub context_std: f64,
    /// Batch, width.
    pub pooled_shape: Vec<usize>,
    pub pooled_mean: f64,
    pub pooled_std: f64,
    /// `f32`, `bf16` or `f16`
    pub dtype: &'static str,
}

/// The answer to `tokenize`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Tokenized {
    pub model: String,
    /// One entry a tokenizer, in the order of the text encoders.
    pub tokenizers: Vec<TokenList>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct TokenList {
    /// `tokenizer` or `tokenizer_2`
    pub name: &'static str,
    /// Without start, end and padding.
    pub ids: Vec<u32>,
    /// Entries of the vocabulary; `</w>` ends a word.
    pub tokens: Vec<String>,
    pub count: usize,
    /// How many times 77 positions the text takes, start and end included.
    pub chunks: usize,
}

/// The answer to `list`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct ConditioningList {
    /// Ways of writing weights into a prompt. A prompt is plain text as yet.
    pub prompt_syntax: Vec<&'static str>,
    /// ControlNet preprocessors. There are none as yet.
    pub preprocessors: Vec<&'static str>,
    /// Tokens that a prompt may have.
    pub max_tokens: usize,
}

pub struct Conditioning;

impl Interface for Conditioning {
    const DOMAIN: Domain = Domain::Conditioning;
    const OPERATIONS: &'static [&'static str] = &["encode_prompt", "tokenize", "list"];
    type Request = Request;
    type Response = Response;
}
