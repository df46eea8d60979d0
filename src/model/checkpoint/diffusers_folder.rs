//! Reads a checkpoint in the diffusers folder layout from its small files; the weights are read when a network is built.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::model::catalog::demo;
use crate::model::catalog::files::{ModelFile, ModelFolder};
use crate::model::checkpoint::Checkpoint;
use crate::model::checkpoint::builder::{CheckpointBuilder, Component};
use crate::model::checkpoint::families::Family;
use crate::model::checkpoint::families::variants::TrainingVariant;
use crate::model::checkpoint::files::{CONFIG_LIMIT, WeightFiles, tokenizer_files, weight_files};
use crate::model::checkpoint::key::key;
use crate::model::checkpoint::part::Part;
use crate::model::networks::vae::VaeConfig;
use crate::roots::Roots;
use crate::scheduler::config::SchedulerConfig;

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class_name: String,
    #[serde(default = "yes")]
    force_zeros_for_empty_prompt: bool,
    #[serde(default)]
    is_cosxl_edit: bool,
    text_encoder: Option<ComponentClass>,
    text_encoder_2: Option<ComponentClass>,
    unet: Option<ComponentClass>,
    vae: Option<ComponentClass>,
}

/// Library and class; both null for a component that the pipeline lacks.
type ComponentClass = (Option<String>, Option<String>);

/// diffusers' default of `force_zeros_for_empty_prompt`.
fn yes() -> bool {
    true
}

impl Checkpoint {
    /// The embedded demonstration model.
    ///
    /// # Errors
    /// None, unless the binary was built from damaged assets.
    pub fn demo() -> Result<Self> {
        CheckpointBuilder::from_folder(demo::NAME, &ModelFolder::Embedded)?.finish()
    }

    /// Reads the folder `path` under `roots`; `name` is its name in requests.
    ///
    /// # Errors
    /// `model_unsupported` for a model other than SDXL, `unsafe_format` for pickle weights, `model_corrupt` for missing or
    /// broken files, `path_not_allowed` for links out of the roots.
    pub fn open_folder(name: &str, path: &Path, roots: &Roots) -> Result<Self> {
        CheckpointBuilder::from_folder(name, &ModelFolder::Disk { path: path.to_owned(), roots: roots.clone() })?
            .finish()
    }

    /// True if the `model_index.json` of the folder `path` names an SDXL pipeline.
    #[must_use]
    pub(crate) fn claims_sdxl(path: &Path) -> bool {
        let index = ModelFile::Disk(path.join("model_index.json")).json::<ModelIndex>(CONFIG_LIMIT);
        index.is_ok_and(|index| Family::knows(&index.class_name))
    }

    /// True if files of the model are missing from the folder `path`, for example after a partial download.
    #[must_use]
    pub(crate) fn lacks_files(path: &Path) -> bool {
        let Ok(index) = ModelFile::Disk(path.join("model_index.json")).json::<ModelIndex>(CONFIG_LIMIT) else {
            return true;
        };
        let lacks = |(part, component): (Part, &Option<ComponentClass>)| {
            let folder = path.join(part.name());
            let mut files = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
            let is_weights =
                |file: std::path::PathBuf| file.extension().is_some_and(|end| end == "safetensors") && file.is_file();
            matches!(component, Some((_, Some(_)))) && !(folder.join("config.json").is_file() && files.any(is_weights))
        };
        let parts = [
            (Part::TextEncoder, &index.text_encoder),
            (Part::TextEncoder2, &index.text_encoder_2),
            (Part::Unet, &index.unet),
            (Part::Vae, &index.vae),
        ];
        parts.into_iter().any(lacks) || !path.join("scheduler/scheduler_config.json").is_file()
    }
}

impl CheckpointBuilder {
    /// Starts from a folder in the diffusers layout.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::open_folder`].
    pub(crate) fn from_folder(name: &str, folder: &ModelFolder) -> Result<Self> {
        let unsupported = |message: String| Error::ModelUnsupported { name: name.to_owned(), message };
        let mut files = Vec::new();
        let Some(found) = folder.find("model_index.json")? else {
            return Err(unsupported(
                "it is not a model in the diffusers folder layout: `model_index.json` is missing".into(),
            ));
        };
        let index: ModelIndex = found.json(CONFIG_LIMIT)?;
        files.push(found);
        if !Family::knows(&index.class_name) {
            return Err(unsupported(format!("it is a `{}`, and this worker runs SDXL", index.class_name)));
        }
        let has = |component: &Option<ComponentClass>| matches!(component, Some((_, Some(_))));
        for (part, component) in
            [(Part::TextEncoder2, &index.text_encoder_2), (Part::Unet, &index.unet), (Part::Vae, &index.vae)]
        {
            if !has(component) {
                return Err(unsupported(format!("it has no `{}`, and every SDXL model has one", part.name())));
            }
        }
        let mut network = |part: Part| -> Result<(ModelFile, WeightFiles)> {
            let config = folder.need(&format!("{}/config.json", part.name()))?;
            let weights = weight_files(folder, part.name(), part.stem())?;
            files.push(config.clone());
            files.extend(weights.files.iter().cloned());
            Ok((config, weights))
        };
        let first = has(&index.text_encoder).then(|| network(Part::TextEncoder)).transpose()?;
        let (second, unet, vae) = (network(Part::TextEncoder2)?, network(Part::Unet)?, network(Part::Vae)?);
        let scheduler = folder.need("scheduler/scheduler_config.json")?;
        files.push(scheduler.clone());
        let tokenizers = [tokenizer_files(folder, "tokenizer")?, tokenizer_files(folder, "tokenizer_2")?];
        for tokenizer in tokenizers.iter().flatten() {
            files.extend([&tokenizer.vocab, &tokenizer.merges].into_iter().chain(&tokenizer.config).cloned());
        }
        let (vae, scheduler): (Component<VaeConfig>, SchedulerConfig) =
            (component(vae)?, scheduler.json(CONFIG_LIMIT)?);
        Ok(Self {
            name: name.to_owned(),
            key: key(folder, &files),
            pipeline: Some(index.class_name),
            force_zeros_for_empty_prompt: Some(index.force_zeros_for_empty_prompt),
            scales_image: index.is_cosxl_edit,
            variant: TrainingVariant::from_scheduler(&scheduler),
            scheduler,
            tokenizers,
            text_encoder: first.map(component).transpose()?,
            text_encoder_2: Some(component(second)?),
            unet: Some(component(unet)?),
            latents: vae.config.clone(),
            vae: Some(vae),
        })
    }
}

/// Parses the configuration of a network.
fn component<T: DeserializeOwned>((config, weights): (ModelFile, WeightFiles)) -> Result<Component<T>> {
    Ok(Component { config: config.json(CONFIG_LIMIT)?, weights })
}
