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

/// How the weights of a prompt's words act. The way in which they are written is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PromptWeighting {
    /// AUTOMATIC1111's: states times weights, and the mean of the chunk restored.
    #[default]
    A1111,
    /// compel's: away from the states of the empty text; below 1 also towards those without the words.
    Compel,
    /// ComfyUI's: away from the states of the empty text.
    Comfy,
    /// The prompt is plain text: brackets and `AND` are characters.
    None,
}

/// A textual inversion: a safetensors file for SDXL, whose vectors stand in for a word of the prompts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EmbeddingWish {
    /// The file beneath a model root, or in a folder `embeddings` there; with its ending or without.
    #[serde(alias = "path")]
    pub name: String,
    /// The word of the prompts that stands for it, in whatever case. Default: the name of the file without its ending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// A textual inversion that a prompt used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct AppliedEmbedding {
    pub name: String,
    pub token: String,
    /// Positions of a prompt that it takes.
    pub vectors: usize,
    /// The text encoders that it was given to: `text_encoder`, `text_encoder_2`.
    pub encoders: Vec<&'static str>,
}

/// How many texts were known, and how many a network had to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct CacheCount {
    pub hits: usize,
    pub misses: usize,
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
    /// At most 2400 tokens; beyond 75 it is encoded in chunks of 75. Of one that changes from step to step, or has
    /// parts joined by `AND`, the first step's first part is encoded, of 25 steps.
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
    /// How the weights of words act. Default: `a1111`.
    #[serde(default)]
    pub prompt_weighting: Option<PromptWeighting>,
    /// Textual inversions for words of the prompts, at most 64.
    #[serde(default)]
    pub embeddings: Option<Vec<EmbeddingWish>>,
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
    /// What a prompt may be written with.
    pub prompt_syntax: Vec<&'static str>,
    /// What `prompt_weighting` may be.
    pub prompt_weightings: Vec<PromptWeighting>,
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
