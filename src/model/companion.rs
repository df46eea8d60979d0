//! A network that goes beside a checkpoint, such as a ControlNet or an adapter: one safetensors file, or a folder in
//! diffusers' layout with the network's `config.json`. Its weights are not read here.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::checkpoint::{CONFIG_LIMIT, CheckpointKey, WeightFiles, key, weight_files};
use super::folder::{Folder, Found};
use super::workers::open::{Open, OpenTask, Weights};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::roots::Roots;
use crate::units::Bytes;

/// How weight files begin: diffusers' networks, transformers', and adapters that diffusers and PEFT saved.
const STEMS: [&str; 4] = ["diffusion_pytorch_model", "model", "pytorch_lora_weights", PEFT];
/// PEFT's files.
const PEFT: &str = "adapter_model";
const PEFT_CONFIG: &str = "adapter_config.json";

/// A network that was found, and whose files may be read.
#[derive(Debug)]
pub struct Companion {
    /// What requests call it.
    pub name: String,
    /// Tells this state of its files from every other.
    pub key: CheckpointKey,
    config: Option<Found>,
    /// What PEFT says of an adapter beside its weights.
    peft: Option<Found>,
    weights: WeightFiles,
    mmap: bool,
}

impl Companion {
    /// What lies at `path`, which is beneath `roots`; requests call it `name`.
    ///
    /// # Errors
    /// `unsafe_format` for pickle files, `model_unsupported` for other files that are no safetensors or GGUF, `model_corrupt`
    /// for a folder without weights, `path_not_allowed` for links out of the roots.
    pub(super) fn find(name: &str, path: &Path, roots: &Roots, mmap: bool) -> Result<Self> {
        let file = path.is_file();
        let place = if file { path.parent().unwrap_or(path) } else { path };
        let folder = Folder::Disk { path: place.to_owned(), roots: roots.clone() };
        let (config, peft, weights) = if file {
            let end = path.extension().map(|end| end.to_string_lossy().to_lowercase()).unwrap_or_default();
            match end.as_str() {
                "safetensors" | "gguf" => {}
                "ckpt" | "pt" | "pth" | "bin" => return Err(Error::UnsafeFormat { path: path.to_owned() }),
                _ => {
                    let message = "it is neither a safetensors or GGUF file nor a folder".to_owned();
                    return Err(Error::ModelUnsupported { name: name.to_owned(), message });
                }
            }
            let own = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            // Of another file beside it PEFT's configuration says nothing.
            let peft = if own.starts_with(PEFT) { folder.find(PEFT_CONFIG)? } else { None };
            (None, peft, WeightFiles::of(vec![folder.need(&own)?]))
        } else {
            let names = folder.names("");
            let holds = |stem: &&str| {
                let rest = |name: &String| name.strip_prefix(*stem).map(str::to_owned);
                names.iter().filter_map(rest).any(|rest| rest.starts_with('.') && rest.contains(".safetensors"))
            };
            let stem = STEMS.into_iter().find(holds).unwrap_or(STEMS[0]);
            (folder.find("config.json")?, folder.find(PEFT_CONFIG)?, weight_files(&folder, "", stem)?)
        };
        let mut files = weights.files.clone();
        files.extend(config.iter().chain(&peft).cloned());
        Ok(Self { name: name.to_owned(), key: key(&folder, &files), config, peft, weights, mmap })
    }

    /// Its `config.json`, which a single file has not.
    ///
    /// # Errors
    /// `model_corrupt` for what is no JSON of this form.
    pub fn config<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        self.config.as_ref().map(|found| found.json(CONFIG_LIMIT)).transpose()
    }

    /// PEFT's `adapter_config.json`, which other writers' files have not.
    ///
    /// # Errors
    /// Those of [`Self::config`].
    pub(super) fn peft<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        self.peft.as_ref().map(|found| found.json(CONFIG_LIMIT)).transpose()
    }

    pub(super) fn weights(&self) -> &WeightFiles {
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
