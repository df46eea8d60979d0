//! How a network was trained: prediction type, noise schedule and latent scale, from what a file or folder declares.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::model::catalog::files::{ModelFile, ModelFolder};
use crate::model::checkpoint::families::variants::TrainingVariant;
use crate::model::checkpoint::files::CONFIG_LIMIT;
use crate::model::checkpoint::infer_config::SCALING;
use crate::model::checkpoint::part::Part;
use crate::model::networks::vae::VaeConfig;
use crate::model::weights::open::Weights;
use crate::scheduler::config::{Prediction, SchedulerConfig, TimestepSpacing};

/// The training that a single file declares.
pub(crate) struct FileTraining {
    pub(crate) variant: Option<&'static TrainingVariant>,
    pub(crate) scheduler: SchedulerConfig,
    /// False if the file declares nothing and all values are SDXL's defaults.
    pub(crate) declared: bool,
}

impl FileTraining {
    /// Reads marker tensors, `modelspec` metadata and embedded configurations.
    ///
    /// # Errors
    /// `model_corrupt` for an invalid configuration in the metadata.
    pub(crate) fn read(weights: &Weights) -> Result<Self> {
        let marked = TrainingVariant::from_tensors(|name| weights.has(name));
        let text = |key: &str| weights.metadata(key).unwrap_or_default();
        let title = ["modelspec.title", "modelspec.architecture"].map(text).join(" ");
        let variant = marked.or_else(|| TrainingVariant::from_title(&title));
        let mut scheduler = TrainingVariant::scheduler(variant);
        let predicted = ["modelspec.prediction_type", "modelspec.predict_key"].map(text);
        let is_v = predicted.iter().any(|kind| matches!(*kind, "v" | "v_prediction"));
        if marked.is_none() && is_v {
            scheduler.prediction_type = Prediction::VPrediction;
        }
        // The marker alone does not count: at zero terminal SNR, epsilon prediction has no signal.
        if weights.has("ztsnr") && !scheduler.is_edm() && scheduler.prediction_type == Prediction::VPrediction {
            scheduler.rescale_betas_zero_snr = Some(true);
            // Lin et al. 2023, section 3.3: sampling must start at the last timestep.
            scheduler.timestep_spacing = Some(TimestepSpacing::Trailing);
        }
        for (name, field) in
            [("edm_vpred.sigma_max", &mut scheduler.sigma_max), ("edm_vpred.sigma_min", &mut scheduler.sigma_min)]
        {
            if let Some(&[value]) = weights.numbers(name, 1)?.as_deref()
                && value.is_finite()
                && value > 0.0
            {
                *field = Some(value);
            }
        }
        let own = weights.metadata("config.scheduler").is_some();
        if let Some(config) = metadata_config(weights, "scheduler")? {
            scheduler = config;
        }
        let variant = variant.or_else(|| TrainingVariant::from_scheduler(&scheduler));
        Ok(Self { declared: own || variant.is_some(), variant, scheduler })
    }
}

/// The configuration of `part` in a file's metadata, in the form of diffusers' `config.json`.
pub(crate) fn metadata_config<T: DeserializeOwned>(weights: &Weights, part: &str) -> Result<Option<T>> {
    let Some(text) = weights.metadata(&format!("config.{part}")) else { return Ok(None) };
    let config = serde_json::from_str(text).map_err(|e| Error::ModelCorrupt {
        path: weights.path(0).to_owned(),
        message: format!("has an invalid `config.{part}` in its metadata: {e}"),
    })?;
    Ok(Some(config))
}

/// Reads the mean and standard deviation of the latents, if the file has them.
fn read_moments(weights: &Weights, latents: &mut VaeConfig) -> Result<()> {
    let four = |name: &str| -> Result<Option<Vec<f64>>> { Ok(weights.numbers(name, 4)?.filter(|all| all.len() == 4)) };
    if let (Some(mean), Some(std)) = (four("edm_mean")?, four("edm_std")?)
        && mean.iter().chain(&std).all(|value| value.is_finite())
        && std.iter().all(|value| *value > 0.0)
    {
        (latents.latents_mean, latents.latents_std) = (Some(mean), Some(std));
    }
    Ok(())
}

/// The fields of `model_index.json` that a single file may carry.
#[derive(Deserialize)]
pub(crate) struct ModelIndexFields {
    #[serde(rename = "_class_name")]
    pub(crate) class_name: Option<String>,
    pub(crate) force_zeros_for_empty_prompt: Option<bool>,
    #[serde(default)]
    is_cosxl_edit: bool,
}

/// Scale, mean and standard deviation of the latents of a single file.
pub(crate) fn latent_scale(weights: &Weights, variant: Option<&TrainingVariant>) -> Result<VaeConfig> {
    let scaling_factor = variant.and_then(|variant| variant.scaling_factor).unwrap_or(SCALING);
    let mut latents = VaeConfig { scaling_factor, ..VaeConfig::default() };
    read_moments(weights, &mut latents)?;
    Ok(latents)
}

/// The training of a UNet that replaces the checkpoint's.
pub(crate) struct UnetTraining {
    pub(crate) scales_image: bool,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) variant: Option<&'static TrainingVariant>,
    /// The scale of its latents; `None` keeps the checkpoint's.
    pub(crate) latents: Option<VaeConfig>,
}

impl UnetTraining {
    /// Reads a single file; `None` if the file declares nothing. `other` is the variant of the checkpoint.
    pub(crate) fn from_file(weights: &Weights, other: Option<&TrainingVariant>) -> Result<Option<Self>> {
        let FileTraining { variant, scheduler, declared } = FileTraining::read(weights)?;
        if !declared {
            return Ok(None);
        }
        let scaled = variant.is_some() || other.is_some_and(|other| other.scaling_factor.is_some());
        let latents = match metadata_config(weights, Part::Vae.name())? {
            None if scaled => Some(latent_scale(weights, variant)?),
            config => config,
        };
        Ok(Some(Self { scales_image: scheduler.is_edm(), scheduler, variant, latents }))
    }

    /// Reads the diffusers folder whose UNet it is. Also returns the files that were read.
    pub(crate) fn from_folder(folder: &ModelFolder) -> Result<(Self, Vec<ModelFile>)> {
        let index = folder.need("model_index.json")?;
        let scheduler = folder.need("scheduler/scheduler_config.json")?;
        let vae = folder.find("vae/config.json")?;
        let scales_image = index.json::<ModelIndexFields>(CONFIG_LIMIT)?.is_cosxl_edit;
        let latents = vae.as_ref().map(|vae| vae.json(CONFIG_LIMIT)).transpose()?;
        let files = [index, scheduler.clone()].into_iter().chain(vae).collect();
        let scheduler = scheduler.json(CONFIG_LIMIT)?;
        Ok((Self { scales_image, variant: TrainingVariant::from_scheduler(&scheduler), scheduler, latents }, files))
    }
}
