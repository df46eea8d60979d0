//! What can be asked of the conditioning domain.

use serde::{Deserialize, Serialize};

use crate::conditioning::init_image::ResizeMode;
use crate::image::source::ImageSource;
use crate::layers::{Domain, Interface, Nothing};
use crate::postprocessing::interface::OutputOptions;

/// The section `workers.instructors.conditioning` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether the embeddings of prompts are kept for the next request.
    pub cache_embeddings: bool,
    /// Whether the hints of ControlNets are kept for the next request.
    pub cache_hints: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache_embeddings: true, cache_hints: true }
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
pub struct EmbeddingRequest {
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
    EncodePrompt(EncodeRequest),
    /// The tokens of a text.
    Tokenize(TokenizeRequest),
    /// The hint that a preprocessor makes of an image.
    Preprocess(Box<PreprocessRequest>),
    /// Which conditioning there is.
    List(Nothing),
}

impl Request {
    /// Whether it must run where the weights are. What needs none is answered while an image is made.
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
    pub embeddings: Option<Vec<EmbeddingRequest>>,
    /// A name that `model.list` gives. Default: the default model.
    #[serde(default)]
    pub model: Option<String>,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// At most 64 KiB.
    pub text: String,
    /// A name that `model.list` gives. Default: the default model.
    #[serde(default)]
    pub model: Option<String>,
}

/// An image and what to make of it.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct PreprocessRequest {
    /// PNG, JPEG or WebP.
    pub image: ImageSource,
    /// A name that `conditioning.list` gives.
    pub preprocessor: String,
    /// The preprocessor's numbers. Default: its own.
    #[serde(default)]
    pub parameters: Option<PreprocessorParameters>,
    /// Of the hint, 1 to 8192 pixels. Default: the image's.
    #[serde(default)]
    pub width: Option<i64>,
    /// Of the hint, 1 to 8192 pixels. Default: the image's.
    #[serde(default)]
    pub height: Option<i64>,
    /// How an image of another size is brought to the hint's, before the preprocessor sees it. Default: `stretch`.
    #[serde(default)]
    pub resize_mode: Option<ResizeMode>,
    /// Where the hint goes, and in which format.
    #[serde(default)]
    pub output: Option<OutputOptions>,
}

/// What a preprocessor can be told; `conditioning.list` says which has which, with range and default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct PreprocessorParameters {
    /// `canny`: the gradient |dx| + |dy| above which an edge goes on, 0 to 2040. Default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_threshold: Option<f64>,
    /// `canny`: the gradient |dx| + |dy| above which an edge begins, 0 to 2040. Default 200.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_threshold: Option<f64>,
    /// `threshold`: what a pixel's darkest channel must exceed to become white, 0 to 255. Default 127.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Standard deviation of the Gaussian in pixels. `blur`: 0.1 to 64, default 9. `lineart`: 0.5 to 32, default 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
    /// `tile`: by what width and height are divided, 1 to 32. Default 1, which changes nothing.
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
    /// ControlNet preprocessors.
    pub preprocessors: Vec<PreprocessorEntry>,
    /// Tokens that a prompt may have.
    pub max_tokens: usize,
}

/// A preprocessor and what it can be told.
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
    /// The file's bytes, where the request asked for them in place of a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    pub format: &'static str,
    pub width: usize,
    pub height: usize,
    pub preprocessor: &'static str,
    /// Every number used.
    pub parameters: PreprocessorParameters,
}

pub struct Conditioning;

impl Interface for Conditioning {
    const DOMAIN: Domain = Domain::Conditioning;
    const OPERATIONS: &'static [&'static str] = &["encode_prompt", "tokenize", "preprocess", "list"];
    type Request = Request;
    type Response = Response;
}
