//! Makes a checkpoint of its parts, wherever each comes from: a folder in diffusers' layout, a single file, or files that
//! the request names in place of a part.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::error::{Error, Result};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::catalog::files::{Folder, Found};
use crate::model::checkpoint::families::variants::Variant;
use crate::model::checkpoint::families::{FAMILIES, Family};
use crate::model::checkpoint::identify;
use crate::model::checkpoint::infer_config;
use crate::model::checkpoint::{CONFIG_LIMIT, Checkpoint, CheckpointKey, Part, TokenizerFiles, WeightFiles};
use crate::model::networks::clip::ClipConfig;
use crate::model::networks::unet::UnetConfig;
use crate::model::networks::vae::VaeConfig;
use crate::model::weights::extract::named;
use crate::model::weights::open::{Weights, look};
use crate::scheduler::config::{Prediction, SchedulerConfig};
use crate::units::Bytes;

/// What becomes a checkpoint once nothing is missing.
pub(crate) struct Draft {
    pub(crate) name: String,
    pub(crate) key: CheckpointKey,
    pub(crate) pipeline: Option<String>,
    /// `None` where the files do not say.
    pub(crate) force_zeros_for_empty_prompt: Option<bool>,
    pub(crate) scales_image: bool,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) variant: Option<&'static Variant>,
    pub(crate) tokenizers: [Option<TokenizerFiles>; 2],
    pub(crate) text_encoder: Option<Piece<ClipConfig>>,
    pub(crate) text_encoder_2: Option<Piece<ClipConfig>>,
    pub(crate) unet: Option<Piece<UnetConfig>>,
    pub(crate) vae: Option<Piece<VaeConfig>>,
    /// Scale, mean and deviation of the latents, for an autoencoder that does not say.
    pub(crate) latents: VaeConfig,
}

/// One network: how it is built, and where its weights are.
pub(crate) struct Piece<C> {
    pub(crate) config: C,
    pub(crate) weights: WeightFiles,
}

/// What one file says of itself beyond its networks.
pub(crate) struct Marks {
    pub(crate) variant: Option<&'static Variant>,
    pub(crate) scheduler: SchedulerConfig,
    /// Whether the file says anything of it.
    pub(crate) told: bool,
}

impl Marks {
    /// Read off the tensors and texts of a file.
    ///
    /// # Errors
    /// `model_corrupt` for a configuration in the metadata that cannot be understood.
    pub(crate) fn of(weights: &Weights) -> Result<Self> {
        let marked = Variant::marked(|name| weights.has(name));
        let text = |key: &str| weights.metadata(key).unwrap_or_default();
        let title = ["modelspec.title", "modelspec.architecture"].map(text).join(" ");
        let variant = marked.or_else(|| Variant::declared(&title));
        let mut scheduler = Variant::scheduler(variant);
        let predicted = ["modelspec.prediction_type", "modelspec.predict_key"].map(text);
        let says_v = predicted.iter().any(|said| matches!(*said, "v" | "v_prediction"));
        if marked.is_none() && says_v {
            scheduler.prediction_type = Prediction::VPrediction;
        }
        // The mark alone says nothing: noise cannot be predicted where there is no signal.
        if weights.has("ztsnr") && !scheduler.is_edm() && scheduler.prediction_type == Prediction::VPrediction {
            scheduler.rescale_betas_zero_snr = Some(true);
            // Lin et al. 2023, section 3.3: a run must start where the signal ends.
            scheduler.timestep_spacing = Some(crate::scheduler::config::TimestepSpacing::Trailing);
        }
        for (name, place) in
            [("edm_vpred.sigma_max", &mut scheduler.sigma_max), ("edm_vpred.sigma_min", &mut scheduler.sigma_min)]
        {
            if let Some(&[value]) = weights.numbers(name, 1)?.as_deref()
                && value.is_finite()
                && value > 0.0
            {
                *place = Some(value);
            }
        }
        let own = weights.metadata("config.scheduler").is_some();
        if let Some(config) = declared(weights, "scheduler")? {
            scheduler = config;
        }
        let variant = variant.or_else(|| Variant::scheduled(&scheduler));
        Ok(Self { told: own || variant.is_some(), variant, scheduler })
    }
}

/// A configuration that a file carries in its metadata, as diffusers' `config.json` of that part.
fn declared<T: serde::de::DeserializeOwned>(weights: &Weights, part: &str) -> Result<Option<T>> {
    let Some(text) = weights.metadata(&format!("config.{part}")) else { return Ok(None) };
    let config = serde_json::from_str(text).map_err(|e| Error::ModelCorrupt {
        path: weights.path(0).to_owned(),
        message: format!("has a `config.{part}` in its metadata that cannot be understood: {e}"),
    })?;
    Ok(Some(config))
}

/// Mean and deviation of the latents, where the file has them.
fn moments(weights: &Weights, latents: &mut VaeConfig) -> Result<()> {
    let four = |name: &str| -> Result<Option<Vec<f64>>> { Ok(weights.numbers(name, 4)?.filter(|all| all.len() == 4)) };
    if let (Some(mean), Some(std)) = (four("edm_mean")?, four("edm_std")?)
        && mean.iter().chain(&std).all(|value| value.is_finite())
        && std.iter().all(|value| *value > 0.0)
    {
        (latents.latents_mean, latents.latents_std) = (Some(mean), Some(std));
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct Index {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    force_zeros_for_empty_prompt: Option<bool>,
    #[serde(default)]
    is_cosxl_edit: bool,
}

/// Scale, mean and deviation of the latents of a file that was looked into.
fn latents(weights: &Weights, variant: Option<&Variant>) -> Result<VaeConfig> {
    let scaling_factor = variant.and_then(|variant| variant.scaling_factor).unwrap_or(infer_config::SCALING);
    let mut latents = VaeConfig { scaling_factor, ..VaeConfig::default() };
    moments(weights, &mut latents)?;
    Ok(latents)
}

/// How a UNet was trained, as far as what brought it says so.
struct Training {
    scales_image: bool,
    scheduler: SchedulerConfig,
    variant: Option<&'static Variant>,
    /// `None` where nothing tells them from those of the model.
    latents: Option<VaeConfig>,
}

impl Training {
    /// Read off a single file for a model of the variant `other`; `None` if the file says nothing.
    fn of_file(weights: &Weights, other: Option<&Variant>) -> Result<Option<Self>> {
        let Marks { variant, scheduler, told } = Marks::of(weights)?;
        if !told {
            return Ok(None);
        }
        let scaled = variant.is_some() || other.is_some_and(|other| other.scaling_factor.is_some());
        let latents = match declared(weights, Part::Vae.name())? {
            None if scaled => Some(latents(weights, variant)?),
            declared => declared,
        };
        Ok(Some(Self { scales_image: scheduler.is_edm(), scheduler, variant, latents }))
    }

    /// Of the whole model in diffusers' layout whose UNet it is, with the files that say so.
    fn of_folder(folder: &Folder) -> Result<(Self, Vec<Found>)> {
        let index = folder.need("model_index.json")?;
        let scheduler = folder.need("scheduler/scheduler_config.json")?;
        let vae = folder.find("vae/config.json")?;
        let scales_image = index.json::<Index>(CONFIG_LIMIT)?.is_cosxl_edit;
        let latents = vae.as_ref().map(|vae| vae.json(CONFIG_LIMIT)).transpose()?;
        let files = [index, scheduler.clone()].into_iter().chain(vae).collect();
        let scheduler = scheduler.json(CONFIG_LIMIT)?;
        Ok((Self { scales_image, variant: Variant::scheduled(&scheduler), scheduler, latents }, files))
    }
}

/// One network of a file that was looked into; `None` if it has none such.
fn piece<C: serde::de::DeserializeOwned>(
    weights: &Weights,
    part: Part,
    files: &WeightFiles,
    derive: impl Fn(&Weights) -> Result<C, String>,
) -> Result<Option<Piece<C>>> {
    let Some(own) = named(weights, part).transpose()? else { return Ok(None) };
    let config = match declared(weights, part.name())? {
        Some(config) => config,
        None => derive(&own).map_err(|message| Error::ModelUnsupported {
            name: weights.path(0).display().to_string(),
            message: format!("its `{}` is unknown: {message}", part.name()),
        })?,
    };
    let bytes = own.tensors().map(|(_, stored)| Bytes(stored.range.end - stored.range.start)).sum();
    Ok(Some(Piece { config, weights: WeightFiles { bytes: Some(bytes), ..files.clone() } }))
}

impl Draft {
    /// What a single file holds.
    ///
    /// # Errors
    /// `model_unsupported` for a file that is no SDXL model, `model_corrupt`, `unsafe_format`.
    pub(crate) fn single(name: &str, key: CheckpointKey, files: WeightFiles) -> Result<Self> {
        let found = files.files.first().ok_or_else(|| Error::bug("a single file without a file"))?;
        let weights = look(found)?;
        bounded(&weights, name)?;
        if !identify::is_sdxl(&weights) {
            return Err(Error::ModelUnsupported { name: name.to_owned(), message: identify::describe(&weights) });
        }
        let Marks { variant, scheduler, .. } = Marks::of(&weights)?;
        let latents = latents(&weights, variant)?;
        let index: Option<Index> = declared(&weights, "model_index")?;
        let (pipeline, force_zeros) =
            index.map_or((None, None), |index| (index.class_name, index.force_zeros_for_empty_prompt));
        let scaled = |weights: &Weights| infer_config::vae(weights).map(|config| scaled_as(config, &latents));
        let vae = piece(&weights, Part::Vae, &files, scaled)?;
        Ok(Self {
            name: name.to_owned(),
            key,
            pipeline,
            force_zeros_for_empty_prompt: force_zeros,
            scales_image: scheduler.is_edm(),
            scheduler,
            variant,
            tokenizers: [None, None],
            text_encoder: piece(&weights, Part::TextEncoder, &files, infer_config::clip)?,
            text_encoder_2: piece(&weights, Part::TextEncoder2, &files, infer_config::clip)?,
            unet: piece(&weights, Part::Unet, &files, infer_config::unet)?,
            latents: vae.as_ref().map_or(latents, |vae| vae.config.clone()),
            vae,
        })
    }

    /// Takes `part` from another file or folder.
    ///
    /// # Errors
    /// `model_unsupported` if it has no such part, `model_corrupt`, `unsafe_format`.
    pub(crate) fn replace(&mut self, part: Part, other: &ComponentFile) -> Result<()> {
        let files = other.weights();
        let mut first = None;
        for found in &files.files {
            let weights = look(found)?;
            bounded(&weights, &other.name)?;
            if named(&weights, part).is_some() || files.files.len() == 1 {
                first = Some(weights);
                break;
            }
        }
        let refuse = |message: String| Error::ModelUnsupported { name: other.name.clone(), message };
        let weights = first.ok_or_else(|| refuse(format!("it holds no `{}`", part.name())))?;
        if let Some(kind) = identify::kind(&weights) {
            return Err(refuse(format!("it is {kind}, and no `{}`", part.name())));
        }
        let mut said = Vec::new();
        match part {
            Part::TextEncoder => self.text_encoder = Some(taken(&weights, part, other, infer_config::clip)?),
            Part::TextEncoder2 => self.text_encoder_2 = Some(taken(&weights, part, other, infer_config::clip)?),
            Part::Vae => {
                let latents = &self.latents;
                let scaled = |weights: &Weights| infer_config::vae(weights).map(|config| scaled_as(config, latents));
                self.vae = Some(taken(&weights, part, other, scaled)?);
            }
            Part::Unet => {
                self.unet = Some(taken(&weights, part, other, infer_config::unet)?);
                let (training, files) = match other.whole(part) {
                    Some(whole) => Training::of_folder(&whole).map(|(training, files)| (Some(training), files))?,
                    None => (Training::of_file(&weights, self.variant)?, Vec::new()),
                };
                said = files;
                if let Some(training) = training {
                    self.take(training);
                }
            }
        }
        let mut hasher = DefaultHasher::new();
        said.iter().for_each(|found| (found.path(), found.stamp()).hash(&mut hasher));
        (self.key, part, other.key).hash(&mut hasher);
        self.key = CheckpointKey(hasher.finish());
        Ok(())
    }

    fn take(&mut self, training: Training) {
        let Training { scales_image, scheduler, variant, latents } = training;
        (self.scales_image, self.variant, self.scheduler) = (scales_image, variant, scheduler);
        if let Some(latents) = latents {
            // The autoencoder stays, and reads latents of the UNet's scale.
            if let Some(vae) = &mut self.vae {
                vae.config = scaled_as(std::mem::take(&mut vae.config), &latents);
            }
            self.latents = latents;
        }
    }

    /// The checkpoint, if it is whole and its parts fit together.
    ///
    /// # Errors
    /// `model_unsupported`.
    pub(crate) fn finish(self) -> Result<Checkpoint> {
        let name = self.name;
        let unsupported = |message: String| Error::ModelUnsupported { name: name.clone(), message };
        let Some(unet) = self.unet else {
            return Err(unsupported("it has no `unet`, and every SDXL model has one".to_owned()));
        };
        unet.config.check(&format!("{name}/{}", Part::Unet.name()))?;
        let context = unet.config.context_channels();
        let second_width = self.text_encoder_2.as_ref().map_or(1280, |second| second.config.hidden_size);
        let needs_first = context != second_width;
        let missing: Vec<&str> = [
            (Part::TextEncoder, needs_first && self.text_encoder.is_none()),
            (Part::TextEncoder2, self.text_encoder_2.is_none()),
            (Part::Vae, self.vae.is_none()),
        ]
        .into_iter()
        .filter(|(_, missing)| *missing)
        .map(|(part, _)| part.name())
        .collect();
        let (Some(second), Some(vae), true) = (self.text_encoder_2, self.vae, missing.is_empty()) else {
            let list = missing.join("` and no `");
            let named = missing.iter().map(|part| format!("\"{part}\": \"FILE\"")).collect::<Vec<_>>().join(", ");
            return Err(unsupported(format!("it has no `{list}`: name files that have, as {named}")));
        };
        let first = self.text_encoder.filter(|_| needs_first);
        let channels = unet.config.in_channels;
        let family = Family::detect(first.is_some(), channels, &unet.config.depths()?).ok_or_else(|| {
            let known = FAMILIES.iter().map(|(name, family)| format!("{name} ({})", family.channels));
            let known = known.collect::<Vec<_>>().join(", ");
            unsupported(format!("its UNet takes {channels} channels, and this worker knows {known}"))
        })?;
        for (part, encoder) in [(Part::TextEncoder, first.as_ref()), (Part::TextEncoder2, Some(&second))] {
            encoder.map_or(Ok(()), |piece| piece.config.check(&format!("{name}/{}", part.name())))?;
        }
        let width = second.config.hidden_size + first.as_ref().map_or(0, |first| first.config.hidden_size);
        if width != context {
            let message = format!("its UNet reads {context} channels of text, and its text encoders give {width}");
            return Err(unsupported(message));
        }
        vae.config.check(&format!("{name}/{}", Part::Vae.name()))?;
        let mut weights = Vec::new();
        let mut text_encoder = None;
        if let Some(first) = first {
            weights.push((Part::TextEncoder, first.weights));
            text_encoder = Some(first.config);
        }
        weights.push((Part::TextEncoder2, second.weights));
        weights.push((Part::Unet, unet.weights));
        weights.push((Part::Vae, vae.weights));
        Ok(Checkpoint {
            key: self.key,
            family,
            variant: self.variant.map(|variant| variant.name),
            pipeline: self.pipeline.unwrap_or_else(|| family.pipelines.first().copied().unwrap_or_default().to_owned()),
            // As the published refiner has it, and the base.
            force_zeros_for_empty_prompt: self.force_zeros_for_empty_prompt.unwrap_or(family.first_encoder),
            scales_image: self.scales_image,
            text_encoder,
            text_encoder_2: second.config,
            unet: unet.config,
            vae: vae.config,
            scheduler: self.scheduler,
            revision: None,
            mmap: true,
            tokenizers: self.tokenizers,
            weights,
            name,
        })
    }
}

/// More tensors than any single file of SDXL has, which has about 2500. Further ones would only take memory.
const MOST_TENSORS: usize = 20_000;

fn bounded(weights: &Weights, name: &str) -> Result<()> {
    match weights.tensors().count() {
        0..=MOST_TENSORS => Ok(()),
        count => Err(Error::ModelUnsupported {
            name: name.to_owned(),
            message: format!("it has {count} tensors, and a model has at most {MOST_TENSORS}"),
        }),
    }
}

/// A part of a file or folder that was named for it.
fn taken<C: serde::de::DeserializeOwned>(
    weights: &Weights,
    part: Part,
    other: &ComponentFile,
    derive: impl Fn(&Weights) -> Result<C, String>,
) -> Result<Piece<C>> {
    let files = other.weights();
    if let Some(config) = other.config()? {
        return Ok(Piece { config, weights: files.clone() });
    }
    if files.files.len() > 1 {
        let message = "it has several files and no `config.json`".to_owned();
        return Err(Error::ModelUnsupported { name: other.name.clone(), message });
    }
    piece(weights, part, files, derive)?.ok_or_else(|| Error::ModelUnsupported {
        name: other.name.clone(),
        message: format!("it holds no `{}`", part.name()),
    })
}

/// `config` with the scale of the latents that `latents` has.
fn scaled_as(config: VaeConfig, latents: &VaeConfig) -> VaeConfig {
    VaeConfig {
        scaling_factor: latents.scaling_factor,
        shift_factor: latents.shift_factor,
        latents_mean: latents.latents_mean.clone(),
        latents_std: latents.latents_std.clone(),
        ..config
    }
}
