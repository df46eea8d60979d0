//! A network in files of its own, such as a ControlNet, an adapter or a separate UNet: one safetensors or GGUF file, or a
//! diffusers folder with its `config.json`. The weights are read when the network is built.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::catalog::files::{ModelFile, ModelFolder};
use crate::model::checkpoint::files::{CONFIG_LIMIT, WeightFiles, weight_files};
use crate::model::checkpoint::key::{CheckpointKey, key};
use crate::model::checkpoint::part::Part;
use crate::model::weights::open::{Open, OpenTask, Weights, is_pickle};
use crate::roots::Roots;
use crate::units::Bytes;

/// Stems of weight files: diffusers' networks, transformers' networks, and adapters saved by diffusers and PEFT.
const STEMS: [&str; 4] = ["diffusion_pytorch_model", "model", "pytorch_lora_weights", PEFT];
/// PEFT's weight file and configuration.
const PEFT: &str = "adapter_model";
const PEFT_CONFIG: &str = "adapter_config.json";

/// The files of one network.
#[derive(Debug)]
pub struct ComponentFile {
    /// Its name in requests.
    pub name: String,
    /// Identifies its files and their state.
    pub key: CheckpointKey,
    config: Option<ModelFile>,
    /// PEFT's configuration of an adapter.
    peft: Option<ModelFile>,
    weights: WeightFiles,
    mmap: bool,
    /// Its folder; `None` for a single file.
    folder: Option<ModelFolder>,
}

impl ComponentFile {
    /// Reads the file or folder `path` under `roots`; `name` is its name in requests.
    ///
    /// # Errors
    /// `unsafe_format` for pickle files, `model_unsupported` for other files than safetensors or GGUF, `model_corrupt`
    /// for a folder without weights, `path_not_allowed` for links out of the roots.
    pub(crate) fn find(name: &str, path: &Path, roots: &Roots, mmap: bool) -> Result<Self> {
        let file = path.is_file();
        let folder = if file { path.parent().unwrap_or(path) } else { path };
        let folder = ModelFolder::Disk { path: folder.to_owned(), roots: roots.clone() };
        let (config, peft, weights) = if file {
            if !path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) {
                readable(name, path)?;
            }
            let own = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            // PEFT's configuration does not apply to other files in its folder.
            let peft = if own.starts_with(PEFT) { folder.find(PEFT_CONFIG)? } else { None };
            (None, peft, WeightFiles::new(vec![folder.need(&own)?]))
        } else {
            let names = folder.names("");
            let weights = match (stem(&names), only(&names)) {
                (None, Some(only)) => WeightFiles::new(vec![folder.need(only)?]),
                (stem, _) => weight_files(&folder, "", stem.unwrap_or(STEMS[0]))?,
            };
            (folder.find("config.json")?, folder.find(PEFT_CONFIG)?, weights)
        };
        let mut files = weights.files.clone();
        files.extend(config.iter().chain(&peft).cloned());
        let key = key(&folder, &files);
        Ok(Self { name: name.to_owned(), key, config, peft, weights, mmap, folder: (!file).then_some(folder) })
    }

    /// True if the folder `path` holds weights under a usual name.
    pub(crate) fn is_network(path: &Path, roots: &Roots) -> bool {
        stem(&ModelFolder::Disk { path: path.to_owned(), roots: roots.clone() }.names("")).is_some()
    }

    /// True if the folder `path` holds a whole model, or no weights or configuration at all.
    pub(crate) fn is_not_a_network(path: &Path, roots: &Roots) -> bool {
        let names = ModelFolder::Disk { path: path.to_owned(), roots: roots.clone() }.names("");
        let ends = [".safetensors", ".gguf", ".json", ".bin", ".ckpt", ".pt", ".pth"];
        let whole = names.iter().any(|name| name == "model_index.json");
        stem(&names).is_none() && (whole || !names.iter().any(|name| ends.iter().any(|end| name.ends_with(end))))
    }

    /// The diffusers model that this folder is the `part` of; `None` for other folders.
    pub(crate) fn model_folder(&self, part: Part) -> Option<ModelFolder> {
        let Some(ModelFolder::Disk { path, roots }) = &self.folder else { return None };
        let above: PathBuf =
            path.parent().filter(|_| path.file_name().is_some_and(|own| own == part.name()))?.to_owned();
        let folder = ModelFolder::Disk { path: above, roots: roots.clone() };
        matches!(folder.find("model_index.json"), Ok(Some(_))).then_some(folder)
    }

    /// Its `config.json`; `None` for a single file.
    ///
    /// # Errors
    /// `model_corrupt` for invalid JSON.
    pub fn config<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        self.config.as_ref().map(|found| found.json(CONFIG_LIMIT)).transpose()
    }

    /// PEFT's `adapter_config.json`; `None` for files of other writers.
    ///
    /// # Errors
    /// The errors of [`Self::config`].
    pub(crate) fn peft<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        self.peft.as_ref().map(|found| found.json(CONFIG_LIMIT)).transpose()
    }

    pub(crate) fn weights(&self) -> &WeightFiles {
        &self.weights
    }

    /// Bytes of its weight files.
    #[must_use]
    pub fn file_bytes(&self) -> Bytes {
        self.weights.size()
    }

    /// Opens the weights and checks their headers.
    ///
    /// # Errors
    /// `model_corrupt` with the file at fault; `cancelled`, `deadline_exceeded`.
    pub fn open(&self, ctx: &Context) -> Result<Weights> {
        let index = self.weights.index.as_ref();
        ctx.perform(&Open, OpenTask { files: &self.weights.files, index, mmap: self.mmap })
    }
}

/// The stem of the weight files among `names`.
fn stem(names: &[String]) -> Option<&'static str> {
    let holds = |stem: &&str| {
        let rest = |name: &String| name.strip_prefix(*stem).map(str::to_owned);
        names.iter().filter_map(rest).any(|rest| rest.starts_with('.') && rest.contains(".safetensors"))
    };
    STEMS.into_iter().find(holds)
}

/// The only weight file among `names`, under any name; `None` for a diffusers model.
fn only(names: &[String]) -> Option<&String> {
    let mut weights = names.iter().filter(|name| name.ends_with(".safetensors") || name.ends_with(".gguf"));
    let only = weights.next().filter(|_| weights.next().is_none());
    only.filter(|_| !names.iter().any(|name| name == "model_index.json"))
}

/// Refuses files other than safetensors, by extension and first bytes.
pub(crate) fn readable(name: &str, path: &Path) -> Result<()> {
    let end = path.extension().map(|end| end.to_string_lossy().to_lowercase()).unwrap_or_default();
    let pickle = || ModelFile::open(path).is_ok_and(|(file, _)| is_pickle(&file));
    match end.as_str() {
        "safetensors" => Ok(()),
        "gguf" => Err(Error::ModelUnsupported {
            name: name.to_owned(),
            message: "it is a GGUF file, which holds only a UNet: name it in `unet`, with a `model`".to_owned(),
        }),
        "ckpt" | "pt" | "pth" | "bin" => Err(Error::UnsafeFormat { path: path.to_owned() }),
        _ if pickle() => Err(Error::UnsafeFormat { path: path.to_owned() }),
        _ => Err(Error::ModelUnsupported {
            name: name.to_owned(),
            message: "it is neither a safetensors file nor a folder in the diffusers layout".to_owned(),
        }),
    }
}
