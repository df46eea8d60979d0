//! Requests, responses and settings of the model domain.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::layers::{Domain, Interface, Nothing, OneOrMany};
use crate::model::checkpoint::part::Part;
use crate::scheduler::config::Prediction;
use crate::units::{Allowance, Bytes};

/// The section `workers.instructors.model` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Weights to keep in memory, of all networks together: bytes as a number or as `4GB`, or a share of the memory
    /// (`60%`). `auto` leaves a quarter of the memory free. The networks of a running request always stay.
    pub cache_size: Allowance,
    /// Keep or free a model's text encoders when a prompt has been encoded.
    pub text_encoders: EncoderPolicy,
    /// On the CPU, map the files of large weights into memory instead of reading them. A mapped file must not be truncated
    /// or changed in place.
    pub mmap: bool,
    /// Folders to search for models.
    pub roots: Vec<PathBuf>,
    /// Model of requests without `model`. Default: the demonstration model.
    pub default: Option<String>,
    /// The hub, for models named `owner/name`.
    pub hub: HubSettings,
}

/// Hugging Face's hub, and the local cache that its tools share.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HubSettings {
    /// Allow `fetch` to use the network. `HF_HUB_OFFLINE=1` in the environment forbids it.
    pub download: bool,
    /// URL of the hub. Default: `$HF_ENDPOINT` or `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Folder of the cache. Default: `$HF_HUB_CACHE`, `$HF_HOME/hub` or `~/.cache/huggingface/hub`.
    pub cache: Option<PathBuf>,
    /// File with an access token. Default: `$HF_TOKEN`, `$HF_TOKEN_PATH` or `$HF_HOME/token`.
    pub token_file: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cache_size: Allowance::Auto,
            text_encoders: EncoderPolicy::Auto,
            mmap: true,
            roots: vec![PathBuf::from("models")],
            default: None,
            hub: HubSettings::default(),
        }
    }
}

/// Policy for text encoders when a prompt has been encoded. Pinned ones stay; cached embeddings need no encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncoderPolicy {
    /// `keep`, unless the model runs on the CPU and its weights take more than 60 % of the memory.
    #[default]
    Auto,
    /// Keep them for the next prompt.
    Keep,
    /// Free them, and read them again for the next new prompt.
    Release,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Lists the available models.
    List(Nothing),
    /// Describes a model from its files without reading weights.
    Inspect(ModelRequest),
    /// Reads a model's weights into memory ahead of the request that needs them.
    Load(ModelRequest),
    /// Frees a model's weights.
    Unload(ModelRequest),
    /// Keeps a model in memory until it is unloaded or unpinned.
    Pin(PinRequest),
    /// Downloads a repository or some of its files into the hub's local cache.
    Fetch(FetchRequest),
}

impl Request {
    /// True if it must run on the compute thread. Other requests are answered while an image is made.
    #[must_use]
    pub fn needs_compute(&self) -> bool {
        match self {
            Self::List(_) | Self::Inspect(_) | Self::Fetch(_) => false,
            Self::Load(_) | Self::Unload(_) | Self::Pin(_) => true,
        }
    }

    /// True if it may wait for the network.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self, Self::Fetch(_))
    }
}

/// Names a model.
#[derive(Clone, Debug, Default, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ModelRequest {
    /// A name from `list`, a path under the configured roots, or `owner/name` of a repository in the hub's cache. Default:
    /// the default model; for `unload`, every model.
    #[serde(default)]
    pub model: Option<String>,
    /// Branch, tag or commit of a repository of the hub. Default: `main`.
    #[serde(default)]
    pub revision: Option<String>,
    /// Replaces the autoencoder: a safetensors file or a folder under the configured roots.
    #[serde(default)]
    pub vae: Option<String>,
    /// Replaces the UNet.
    #[serde(default)]
    pub unet: Option<String>,
    /// Replaces CLIP ViT-L.
    #[serde(default)]
    pub text_encoder: Option<String>,
    /// Replaces OpenCLIP ViT-bigG.
    #[serde(default)]
    pub text_encoder_2: Option<String>,
}

impl ModelRequest {
    /// The components that come from separate files.
    #[must_use]
    pub fn separate(&self) -> [(Part, Option<&str>); 4] {
        [
            (Part::Vae, self.vae.as_deref()),
            (Part::Unet, self.unet.as_deref()),
            (Part::TextEncoder, self.text_encoder.as_deref()),
            (Part::TextEncoder2, self.text_encoder_2.as_deref()),
        ]
    }
}

/// Names a model to pin.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct PinRequest {
    /// A name from `list`, a path under the configured roots, or `owner/name` of a repository in the hub's cache. Default:
    /// the default model.
    #[serde(default)]
    pub model: Option<String>,
    /// Branch, tag or commit of a repository of the hub. Default: `main`.
    #[serde(default)]
    pub revision: Option<String>,
    /// `true` (the default) loads the model and keeps it; `false` allows it to be evicted again.
    #[serde(default)]
    pub pin: Option<bool>,
}

/// Names the files to download.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct FetchRequest {
    /// A repository as `owner/name` or `owner/name@revision`.
    pub model: String,
    /// Branch, tag or commit. Default: `main`.
    #[serde(default)]
    pub revision: Option<String>,
    /// Paths in the repository, or patterns in which `*` stands for any characters and `?` for one, 1 to 256 of them.
    /// Default: the files of a diffusers model, or the only network of the repository.
    #[serde(default)]
    pub files: Option<OneOrMany<String>>,
    /// SHA-256 in hexadecimal digits: of the only weight file, or by file. A file with another hash is not kept.
    #[serde(default)]
    pub sha256: Option<Pins>,
}

/// Hashes that files are pinned to.
#[derive(Clone, Debug, PartialEq, Eq, schemars::JsonSchema)]
#[schemars(untagged)]
pub enum Pins {
    /// The hash of the only weight file.
    One(String),
    /// By the path in the repository.
    Each(BTreeMap<String, String>),
}

impl<'de> Deserialize<'de> for Pins {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PinsVisitor;

        impl<'de> Visitor<'de> for PinsVisitor {
            type Value = Pins;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a SHA-256, or an object of them by file")
            }

            fn visit_str<E: serde::de::Error>(self, hash: &str) -> Result<Pins, E> {
                Ok(Pins::One(hash.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Pins, A::Error> {
                Ok(Pins::Each(BTreeMap::deserialize(MapAccessDeserializer::new(map))?))
            }
        }

        deserializer.deserialize_any(PinsVisitor)
    }
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Response {
    List(ModelList),
    Inspect(Box<Inspection>),
    Load(Loaded),
    Unload(Unloaded),
    Pin(Pinned),
    Fetch(Fetched),
}

/// The answer to `list`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct ModelList {
    pub models: Vec<ModelEntry>,
    /// The model of requests without `model`.
    pub default: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ModelEntry {
    /// Its name in requests: its path relative to a root, or `demo`.
    pub name: String,
    /// The commit, for a repository in the hub's cache.
    pub revision: Option<String>,
    /// `sdxl_base`, `sdxl_refiner`, `sdxl_inpaint`, `sdxl_instruct_pix2pix`, `ssd_1b`, `segmind_vega`, `koala_700m`,
    /// `koala_1b`; `null` if the model is unusable.
    pub family: Option<&'static str>,
    /// Bytes of its weight files.
    pub bytes: Bytes,
    /// Stored dtype of the UNet's weights.
    pub dtype: Option<&'static str>,
    /// Components in memory.
    pub loaded: Vec<&'static str>,
    pub pinned: bool,
    /// Why the model is unusable.
    pub problem: Option<String>,
}

/// The answer to `inspect`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Inspection {
    pub model: String,
    /// The commit, for a repository in the hub's cache.
    pub revision: Option<String>,
    pub family: &'static str,
    /// Training or distillation, if its files declare it: `playground_v2_5`, `cosxl`, `v_prediction`, `turbo`,
    /// `lightning`, `hyper`, `dmd2`.
    pub variant: Option<&'static str>,
    /// `_class_name` of `model_index.json`, or for a single file the usual pipeline of its family.
    pub pipeline: String,
    pub components: Vec<ComponentFacts>,
    pub prediction_type: Prediction,
    /// Default width of images in pixels.
    pub default_width: usize,
    /// Default height of images in pixels.
    pub default_height: usize,
    /// The checkpoint's own scheduler.
    pub scheduler: SchedulerFacts,
    /// True if a missing negative prompt is embedded as zeros instead of as an empty text.
    pub force_zeros_for_empty_prompt: bool,
    pub unet: UnetFacts,
    pub vae: VaeFacts,
    pub text_encoders: Vec<TextEncoderFacts>,
    /// True if the checkpoint has its own tokenizers, false if it uses the built-in vocabulary.
    pub own_tokenizers: bool,
}

/// The weights of one component.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ComponentFacts {
    /// `text_encoder`, `text_encoder_2`, `unet`, `vae`
    pub name: &'static str,
    pub files: usize,
    pub tensors: usize,
    pub parameters: u64,
    pub bytes: Bytes,
    /// Dtypes of the tensors.
    pub dtypes: Vec<&'static str>,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct SchedulerFacts {
    pub class_name: Option<String>,
    /// `leading`, `trailing` or `linspace`; `null` if the checkpoint does not declare it.
    pub timestep_spacing: Option<&'static str>,
    pub zero_terminal_snr: bool,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct UnetFacts {
    pub in_channels: usize,
    pub block_channels: Vec<usize>,
    /// Width of the text embeddings.
    pub context: usize,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct VaeFacts {
    pub scaling_factor: f64,
    pub latent_channels: usize,
    /// True if it overflows in f16.
    pub force_upcast: bool,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct TextEncoderFacts {
    pub name: &'static str,
    pub layers: usize,
    pub width: usize,
}

/// The answer to `load`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Loaded {
    pub model: String,
    pub components: Vec<LoadedComponent>,
    /// Bytes of the components in memory.
    pub bytes: Bytes,
    /// Milliseconds.
    pub ms: u64,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct LoadedComponent {
    /// `encoder` (both text encoders), `unet`, `vae`
    pub name: &'static str,
    /// Bytes in memory.
    pub bytes: Bytes,
    pub ms: u64,
    /// True if it was already in memory.
    pub cached: bool,
}

/// The answer to `unload`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Unloaded {
    /// Names of the models that were unloaded.
    pub models: Vec<String>,
    /// Freed bytes.
    pub freed: Bytes,
}

/// The answer to `pin`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Pinned {
    pub model: String,
    pub pinned: bool,
    /// Bytes in memory.
    pub bytes: Bytes,
}

/// The answer to `fetch`.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Fetched {
    /// Its name in requests.
    pub model: String,
    /// The downloaded commit.
    pub revision: String,
    pub files: Vec<FetchedFile>,
    /// Bytes of all files.
    pub bytes: Bytes,
    /// Bytes that were downloaded now.
    pub downloaded: Bytes,
    /// Milliseconds.
    pub ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct FetchedFile {
    /// Its path in the repository.
    pub name: String,
    pub bytes: Bytes,
    /// True if it was already in the cache.
    pub cached: bool,
    /// SHA-256, if the file was downloaded now or is pinned.
    pub sha256: Option<String>,
}

pub struct Model;

impl Interface for Model {
    const DOMAIN: Domain = Domain::Model;
    const OPERATIONS: &'static [&'static str] = &["list", "inspect", "load", "unload", "pin", "fetch"];
    type Request = Request;
    type Response = Response;
}
