//! What can be asked of the model domain.

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
    /// Weights that are kept in memory, of all networks together: bytes as a number or as `4GB`, or a share of the memory
    /// (`60%`). `auto`: as many as leave a quarter of the memory free. What a request uses is kept while it runs, however
    /// large it is.
    pub cache_size: Allowance,
    /// What becomes of a model's text encoders when a prompt has been encoded.
    pub text_encoders: EncoderPolicy,
    /// Whether, on the CPU, large weights stay in their file, which is mapped into memory, rather than being read. A file
    /// in use must then not be cut off or changed in place.
    pub mmap: bool,
    /// Folders beneath which models are looked for.
    pub roots: Vec<PathBuf>,
    /// Model of requests that name none; the demonstration model when it is left out.
    pub default: Option<String>,
    /// Where models come from that are named as `owner/name`.
    pub hub: HubSettings,
}

/// Hugging Face's hub, and the local cache that its tools share.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HubSettings {
    /// Whether `fetch` may use the network. The environment's `HF_HUB_OFFLINE=1` overrules it.
    pub download: bool,
    /// Address of the hub; `$HF_ENDPOINT` or `https://huggingface.co` when it is left out.
    pub endpoint: Option<String>,
    /// The cache's folder; `$HF_HUB_CACHE`, `$HF_HOME/hub` or `~/.cache/huggingface/hub` when it is left out.
    pub cache: Option<PathBuf>,
    /// A file that holds a token; `$HF_TOKEN`, `$HF_TOKEN_PATH` or `$HF_HOME/token` when it is left out.
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

/// What becomes of text encoders when a prompt has been encoded. Pinned ones stay, and embeddings that are kept need none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncoderPolicy {
    /// `keep`, unless on the CPU the model's weights take more than 60 % of the memory there is.
    #[default]
    Auto,
    /// They stay for the next prompt.
    Keep,
    /// They are freed, and read again for the next prompt that is new.
    Release,
}

#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Every model that can be named.
    List(Nothing),
    /// What a model's files say; its weights are not read.
    Inspect(ModelRequest),
    /// Reads a model's weights into memory ahead of the request that needs them.
    Load(ModelRequest),
    /// Frees a model's weights.
    Unload(ModelRequest),
    /// Keeps a model in memory until it is unloaded, or ends that.
    Pin(PinRequest),
    /// Downloads a repository of the hub, or some of its files, into the local cache.
    Fetch(FetchRequest),
}

impl Request {
    /// Whether it must run where the weights are. What needs none is answered while an image is made.
    #[must_use]
    pub fn needs_compute(&self) -> bool {
        match self {
            Self::List(_) | Self::Inspect(_) | Self::Fetch(_) => false,
            Self::Load(_) | Self::Unload(_) | Self::Pin(_) => true,
        }
    }

    /// Whether it may wait for the network for a long time.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self, Self::Fetch(_))
    }
}

/// Names a model.
#[derive(Clone, Debug, Default, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ModelRequest {
    /// A name that `list` gives, a path beneath the configured roots, or `owner/name` of a repository in the hub's cache.
    /// Left out: the default model; for `unload`, every model.
    #[serde(default)]
    pub model: Option<String>,
    /// Branch, tag or commit of a repository of the hub. Default: `main`.
    #[serde(default)]
    pub revision: Option<String>,
    /// The autoencoder in place of the model's: a safetensors file or a folder beneath the configured roots.
    #[serde(default)]
    pub vae: Option<String>,
    /// The UNet in place of the model's, likewise.
    #[serde(default)]
    pub unet: Option<String>,
    /// CLIP ViT-L in place of the model's, likewise.
    #[serde(default)]
    pub text_encoder: Option<String>,
    /// OpenCLIP ViT-bigG in place of the model's, likewise.
    #[serde(default)]
    pub text_encoder_2: Option<String>,
}

impl ModelRequest {
    /// The parts that come from files of their own.
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

/// Names a model that shall stay.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct PinRequest {
    /// A name that `list` gives, a path beneath the configured roots, or `owner/name` of a repository in the hub's cache.
    /// Left out: the default model.
    #[serde(default)]
    pub model: Option<String>,
    /// Branch, tag or commit of a repository of the hub. Default: `main`.
    #[serde(default)]
    pub revision: Option<String>,
    /// `true` (the default) loads the model and keeps it; `false` lets it go when its place is needed.
    #[serde(default)]
    pub pin: Option<bool>,
}

/// Names what shall be downloaded.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct FetchRequest {
    /// A repository as `owner/name` or `owner/name@revision`.
    pub model: String,
    /// Branch, tag or commit. Default: `main`.
    #[serde(default)]
    pub revision: Option<String>,
    /// Paths in the repository, or patterns in which `*` stands for any characters and `?` for one, 1 to 256 of them.
    /// Default: what a model in the diffusers layout consists of, or the one network of a repository.
    #[serde(default)]
    pub files: Option<OneOrMany<String>>,
    /// SHA-256 in hexadecimal digits: of the one file of weights, or by file. What has another is not kept.
    #[serde(default)]
    pub sha256: Option<Pins>,
}

/// Hashes that files must have.
#[derive(Clone, Debug, PartialEq, Eq, schemars::JsonSchema)]
#[schemars(untagged)]
pub enum Pins {
    /// Of the one file of weights that is asked for.
    One(String),
    /// By the path in the repository.
    Each(BTreeMap<String, String>),
}

impl<'de> Deserialize<'de> for Pins {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hashes;

        impl<'de> Visitor<'de> for Hashes {
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

        deserializer.deserialize_any(Hashes)
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
    /// The model of requests that name none.
    pub default: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ModelEntry {
    /// What requests call it: its path beneath its root, or `demo`.
    pub name: String,
    /// The commit, for a repository of the hub's cache.
    pub revision: Option<String>,
    /// `sdxl_base`, `sdxl_refiner`, `sdxl_inpaint`, `sdxl_instruct_pix2pix`, `ssd_1b`, `segmind_vega`, `koala_700m`,
    /// `koala_1b`; `null` if it cannot be used.
    pub family: Option<&'static str>,
    /// Bytes of its weight files.
    pub bytes: Bytes,
    /// Number format of the UNet's weights as they are stored.
    pub dtype: Option<&'static str>,
    /// Parts that are in memory now.
    pub loaded: Vec<&'static str>,
    pub pinned: bool,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// The answer to `inspect`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Inspection {
    pub model: String,
    /// The commit, for a repository of the hub's cache.
    pub revision: Option<String>,
    pub family: &'static str,
    /// How it was trained or distilled, where its files say: `playground_v2_5`, `cosxl`, `v_prediction`, `turbo`,
    /// `lightning`, `hyper`, `dmd2`.
    pub variant: Option<&'static str>,
    /// `_class_name` of `model_index.json`, or for a single file the pipeline that it would come with.
    pub pipeline: String,
    pub components: Vec<ComponentFacts>,
    pub prediction_type: Prediction,
    /// Width in pixels of an image whose request names none.
    pub default_width: usize,
    /// Height in pixels of an image whose request names none.
    pub default_height: usize,
    /// Class and timestep spacing of the checkpoint's own scheduler.
    pub scheduler: SchedulerFacts,
    /// Whether a missing negative prompt means zeros rather than the encoded empty text.
    pub force_zeros_for_empty_prompt: bool,
    pub unet: UnetFacts,
    pub vae: VaeFacts,
    pub text_encoders: Vec<TextEncoderFacts>,
    /// Whether the checkpoint brings its tokenizers, or uses the built-in vocabulary.
    pub own_tokenizers: bool,
}

/// Weights of one part.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ComponentFacts {
    /// `text_encoder`, `text_encoder_2`, `unet`, `vae`
    pub name: &'static str,
    pub files: usize,
    pub tensors: usize,
    pub parameters: u64,
    pub bytes: Bytes,
    /// Number formats of the tensors.
    pub dtypes: Vec<&'static str>,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct SchedulerFacts {
    pub class_name: Option<String>,
    /// `leading`, `trailing` or `linspace`; `null` if the checkpoint does not say.
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
    /// Whether it must not run in f16.
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
    /// Milliseconds that it took.
    pub ms: u64,
}

#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct LoadedComponent {
    /// `encoder` (both text encoders), `unet`, `vae`
    pub name: &'static str,
    /// Bytes in memory.
    pub bytes: Bytes,
    pub ms: u64,
    /// Whether it was in memory before.
    pub cached: bool,
}

/// The answer to `unload`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Unloaded {
    /// Names of the models that were in memory.
    pub models: Vec<String>,
    /// Bytes that were freed.
    pub freed: Bytes,
}

/// The answer to `pin`.
#[derive(Clone, Debug, Serialize, schemars::JsonSchema)]
pub struct Pinned {
    pub model: String,
    pub pinned: bool,
    /// Bytes that are kept.
    pub bytes: Bytes,
}

/// The answer to `fetch`.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Fetched {
    /// What requests call it now.
    pub model: String,
    /// The commit that was downloaded.
    pub revision: String,
    pub files: Vec<FetchedFile>,
    /// Bytes of all files.
    pub bytes: Bytes,
    /// Bytes that came over the network.
    pub downloaded: Bytes,
    /// Milliseconds that it took.
    pub ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct FetchedFile {
    /// Its path in the repository.
    pub name: String,
    pub bytes: Bytes,
    /// Whether it was in the cache before.
    pub cached: bool,
    /// Of what was downloaded now, or is pinned.
    pub sha256: Option<String>,
}

pub struct Model;

impl Interface for Model {
    const DOMAIN: Domain = Domain::Model;
    const OPERATIONS: &'static [&'static str] = &["list", "inspect", "load", "unload", "pin", "fetch"];
    type Request = Request;
    type Response = Response;
}
