//! The weight and tokenizer files of a checkpoint: single files, or shards with an index.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::model::catalog::files::{ModelFile, ModelFolder};
use crate::units::Bytes;

/// Longest configuration file.
pub(crate) const CONFIG_LIMIT: u64 = 4 * Bytes::MIB;
/// Longest index of a sharded network.
const INDEX_LIMIT: u64 = 64 * Bytes::MIB;
/// Number formats that diffusers appends to file names.
pub(crate) const VARIANTS: [&str; 2] = ["fp16", "bf16"];

/// The vocabulary of one tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct TokenizerFiles {
    pub(crate) vocab: ModelFile,
    pub(crate) merges: ModelFile,
    /// `tokenizer_config.json`
    pub(crate) config: Option<ModelFile>,
}

#[derive(Clone, Debug)]
pub(crate) struct WeightFiles {
    pub(crate) files: Vec<ModelFile>,
    /// Tensor name → file name, for a sharded network.
    pub(crate) index: Option<HashMap<String, String>>,
    /// Bytes of the network's own tensors, if the file holds several networks.
    pub(crate) bytes: Option<Bytes>,
}

impl WeightFiles {
    pub(crate) fn new(files: Vec<ModelFile>) -> Self {
        Self { files, index: None, bytes: None }
    }

    pub(crate) fn size(&self) -> Bytes {
        self.bytes.unwrap_or_else(|| self.files.iter().map(|file| Bytes(file.stamp().0)).sum())
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

/// The path of a file in `dir`; an empty `dir` is the folder itself.
fn path_in(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

/// The weight files of a network in `dir`. A file without a number format in its name comes first, as in diffusers.
pub(crate) fn weight_files(folder: &ModelFolder, dir: &str, stem: &str) -> Result<WeightFiles> {
    let mut candidates = vec![(format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json"))];
    for variant in VARIANTS {
        candidates.push((format!("{stem}.{variant}.safetensors"), format!("{stem}.safetensors.index.{variant}.json")));
    }
    for (single, index) in &candidates {
        if let Some(found) = folder.find(&path_in(dir, single))? {
            return Ok(WeightFiles::new(vec![found]));
        }
        if let Some(found) = folder.find(&path_in(dir, index))? {
            return sharded(folder, dir, &found);
        }
    }
    let names = folder.names(dir);
    let pickle = |name: &&String| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|end| name.to_lowercase().ends_with(end));
    match names.iter().find(pickle) {
        Some(name) => Err(Error::UnsafeFormat { path: folder.path(&path_in(dir, name)) }),
        None => Err(Error::ModelCorrupt {
            path: folder.path(dir),
            message: format!("has no weights: `{stem}.safetensors` is missing"),
        }),
    }
}

fn sharded(folder: &ModelFolder, dir: &str, found: &ModelFile) -> Result<WeightFiles> {
    let corrupt = |message: String| Error::ModelCorrupt { path: found.path().to_owned(), message };
    let ShardIndex { weight_map } = found.json(INDEX_LIMIT)?;
    let names: HashSet<&String> = weight_map.values().collect();
    let mut names: Vec<_> = names.into_iter().collect();
    names.sort();
    if names.is_empty() {
        return Err(corrupt("names no files".to_owned()));
    }
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        if name.contains(['/', '\\', '\0']) || !name.ends_with(".safetensors") {
            return Err(corrupt(format!("must name safetensors files in its own folder, and names `{name}`")));
        }
        files.push(folder.need(&path_in(dir, name))?);
    }
    Ok(WeightFiles { index: Some(weight_map), ..WeightFiles::new(files) })
}

pub(crate) fn tokenizer_files(folder: &ModelFolder, dir: &str) -> Result<Option<TokenizerFiles>> {
    let vocab = folder.find(&format!("{dir}/vocab.json"))?;
    let merges = folder.find(&format!("{dir}/merges.txt"))?;
    let config = folder.find(&format!("{dir}/tokenizer_config.json"))?;
    Ok(match (vocab, merges) {
        (Some(vocab), Some(merges)) => Some(TokenizerFiles { vocab, merges, config }),
        _ => None,
    })
}
