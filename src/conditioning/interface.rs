//! Settings, requests and responses of the conditioning domain.

use serde::{Deserialize, Serialize};

use crate::conditioning::init_image::ResizeMode;
use crate::image::source::ImageSource;
use crate::layers::{Domain, Interface, Nothing};
use crate::postprocessing::interface::OutputOptions;

/// The section `workers.instructors.conditioning` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// True to cache the embeddings of prompts for later requests.
    pub cache_embeddings: bool,
    /// True to cache the hints of ControlNets for later requests.
    pub cache_hints: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache_embeddings: true, cache_hints: true }
    }
}

/// How the weights of a prompt's words act. Their syntax is the same for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PromptWeighting {
    /// AUTOMATIC1111's: states times weights, with the mean of the chunk restored.
    #[default]
    A1111,
    /// compel's: interpolation from the states of the empty text; weights below 1 also mix in the states without the words.
    Compel,
    /// ComfyUI's: interpolation from the states of the empty text.
    Comfy,
    /// The prompt is plain text without syntax.
    None,
}

/// A textual inversion: a safetensors file for SDXL, whose vectors replace a word of the prompts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EmbeddingRequest {
    /// The file under a model root, or in a folder `embeddings` there, with or without its extension.
    #[serde(alias = "path")]
    pub name: String,
    /// The word in the prompts, ignoring case. Default: the name of the file without its extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// A textual inversion that a prompt used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct AppliedEmbedding {
    pub name: String,
    pub token: String,
    /// Number of vectors, each of which takes one position of the prompt.
    pub vectors: usize,
    /// The text encoders that it applies to: `text_encoder`, `text_encoder_2`.
    pub encoders: Vec<&'static str>,
}

/// Number of results from the cache, and of those computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct CacheCount {
    pub hits: usize,
    pub misses: usize,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The embeddings of a prompt, as shapes and statistics.
    EncodePrompt(EncodeRequest),
    /// The tokens of a text.
    Tokenize(TokenizeRequest),
    /// The hint that a preprocessor makes from an image.
    Preprocess(Box<PreprocessRequest>),
    /// The supported conditioning.
    List(Nothing),
}

impl Request {
    /// True if the request must run on the compute thread; others are answered while an image is made.
    #[must_use]
    pub fn needs_compute(&self) -> bool {
        match self {
            Self::List(_) | Self::Tokenize(_) | Self::Preprocess(_) => false,
            Self::EncodePrompt(_) => true,
        }
    }
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EncodeRequest {
    /// At most 2400 tokens; more than 75 are encoded in chunks of 75. Of an edited prompt or one with `AND`, the first
    /// part at the first of 25 steps is encoded.
    pub prompt: String,
    /// Prompt of the second text encoder. Default: `prompt`.
    #[serde(default)]
    pub prompt_2: Option<String>,
    /// If left out: zeros if the checkpoint says so, the empty text otherwise.
    #[serde(default)]
    pub negative_prompt: Option<String>,
    /// Negative prompt of the second text encoder. Default: `negative_prompt`.
    #[serde(default)]
    pub negative_prompt_2: Option<String>,
    /// Layers of the text encoders skipped for the prompt, from 0 (the default).
    #[serde(default)]
    pub clip_skip: Option<u32>,
    /// How the weights of words act. Default: `a1111`.
    #[serde(default)]
    pub prompt_weighting: Option<PromptWeighting>,
    /// Textual inversions for words of the prompts, at most 64.
    #[serde(default)]
    pub embeddings: Option<Vec<EmbeddingRequest>>,
    /// A name from `model.list`. Default: the default model.
    #[serde(default)]
    pub model: Option<String>,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// At most 64 KiB.
    pub text: String,
    /// A name from `model.list`. Default: the default model.
    #[serde(default)]
    pub model: Option<String>,
}

/// An image and its preprocessor.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct PreprocessRequest {
    /// PNG, JPEG or WebP.
    pub image: ImageSource,
    /// A name from `conditioning.list`.
    pub preprocessor: String,
    /// The preprocessor's parameters. Default: its own.
    #[serde(default)]
    pub parameters: Option<PreprocessorParameters>,
    /// Width of the hint, 1 to 8192 pixels. Default: the image's.
    #[serde(default)]
    pub width: Option<i64>,
    /// Height of the hint, 1 to 8192 pixels. Default: the image's.
    #[serde(default)]
    pub height: Option<i64>,
    /// How an image of another size is resized before preprocessing. Default: `stretch`.
    #[serde(default)]
    pub resize_mode: Option<ResizeMode>,
    /// How the hint is returned or written.
    #[serde(default)]
    pub output: Option<OutputOptions>,
}

/// Parameters of preprocessors; `conditioning.list` gives those of each, with range and default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct PreprocessorParameters {
    /// `canny`: the gradient |dx| + |dy| above which an edge continues, 0 to 2040. Default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_threshold: Option<f64>,
    /// `canny`: the gradient |dx| + |dy| above which an edge begins, 0 to 2040. Default 200.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_threshold: Option<f64>,
    /// `threshold`: a pixel becomes white if all its channels exceed this, 0 to 255. Default 127.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Standard deviation of the Gaussian in pixels. `blur`: 0.1 to 64, default 9. `lineart`: 0.5 to 32, default 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
    /// `tile`: divisor of width and height, 1 to 32. Default 1, which changes nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_sampling_rate: Option<f64>,
}

impl PreprocessorParameters {
    /// Every parameter with its name.
    #[must_use]
    pub fn by_name(&self) -> [(&'static str, Option<f64>); 5] {
        [
            ("low_threshold", self.low_threshold),
            ("high_threshold", self.high_threshold),
            ("threshold", self.threshold),
            ("sigma", self.sigma),
            ("down_sampling_rate", self.down_sampling_rate),
        ]
    }
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    EncodePrompt(EncodedPrompt),
    Tokenize(Tokenized),
    Preprocess(PreprocessedImage),
    List(ConditioningList),
}

/// The answer to `encode_prompt`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct EncodedPrompt {
    pub model: String,
    pub positive: EmbeddingFacts,
    pub negative: EmbeddingFacts,
}

/// Statistics of embeddings.
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
    /// One entry for each tokenizer, in the order of the text encoders.
    pub tokenizers: Vec<TokenList>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct TokenList {
    /// `tokenizer` or `tokenizer_2`
    pub name: &'static str,
    /// Without start, end and padding.
    pub ids: Vec<u32>,
    /// Vocabulary entries; `</w>` ends a word.
    pub tokens: Vec<String>,
    pub count: usize,
    /// Number of chunks of 77 positions, including start and end.
    pub chunks: usize,
}

/// The answer to `list`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct ConditioningList {
    /// The syntax of prompts.
    pub prompt_syntax: Vec<&'static str>,
    /// The values of `prompt_weighting`.
    pub prompt_weightings: Vec<PromptWeighting>,
    /// ControlNet preprocessors.
    pub preprocessors: Vec<PreprocessorEntry>,
    /// Most tokens of a prompt.
    pub max_tokens: usize,
}

/// A preprocessor and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct PreprocessorEntry {
    pub name: &'static str,
    pub parameters: Vec<ParameterEntry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ParameterEntry {
    /// A field of `parameters`.
    pub name: &'static str,
    pub default: f64,
    pub least: f64,
    pub most: f64,
}

/// The answer to `preprocess`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct PreprocessedImage {
    /// The file that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The file's bytes, if the request asked for them instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    pub format: &'static str,
    pub width: usize,
    pub height: usize,
    pub preprocessor: &'static str,
    /// Every parameter used.
    pub parameters: PreprocessorParameters,
}

pub struct Conditioning;

impl Interface for Conditioning {
    const DOMAIN: Domain = Domain::Conditioning;
    const OPERATIONS: &'static [&'static str] = &["encode_prompt", "tokenize", "preprocess", "list"];
    type Request = Request;
    type Response = Response;
}
