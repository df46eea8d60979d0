//! Builds a checkpoint from its components: a diffusers folder, a single file, or files that replace a component.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::catalog::files::ModelFile;
use crate::model::checkpoint::families::variants::TrainingVariant;
use crate::model::checkpoint::families::{FAMILIES, Family};
use crate::model::checkpoint::files::{TokenizerFiles, WeightFiles};
use crate::model::checkpoint::identify;
use crate::model::checkpoint::infer_config;
use crate::model::checkpoint::training::{FileTraining, ModelIndexFields, UnetTraining, latent_scale, metadata_config};
use crate::model::checkpoint::{Checkpoint, CheckpointKey, Part};
use crate::model::networks::clip::ClipConfig;
use crate::model::networks::unet::UnetConfig;
use crate::model::networks::vae::VaeConfig;
use crate::model::weights::extract::named;
use crate::model::weights::open::{Weights, look};
use crate::scheduler::config::SchedulerConfig;
use crate::units::Bytes;

/// Output width of OpenCLIP ViT-bigG, for a checkpoint that lacks it.
const BIG_CLIP_WIDTH: usize = 1280;

/// A checkpoint whose components may still be missing or replaced.
pub(crate) struct CheckpointBuilder {
    pub(crate) name: String,
    pub(crate) key: CheckpointKey,
    /// `_class_name` of the pipeline, if the files give it.
    pub(crate) pipeline: Option<String>,
    /// `None` if the files do not give it.
    pub(crate) force_zeros_for_empty_prompt: Option<bool>,
    pub(crate) scales_image: bool,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) variant: Option<&'static TrainingVariant>,
    pub(crate) tokenizers: [Option<TokenizerFiles>; 2],
    pub(crate) text_encoder: Option<Component<ClipConfig>>,
    pub(crate) text_encoder_2: Option<Component<ClipConfig>>,
    pub(crate) unet: Option<Component<UnetConfig>>,
    pub(crate) vae: Option<Component<VaeConfig>>,
    /// Scale, mean and standard deviation of the latents, for an autoencoder that does not give them.
    pub(crate) latents: VaeConfig,
}

/// A network's configuration and weight files.
pub(crate) struct Component<C> {
    pub(crate) config: C,
    pub(crate) weights: WeightFiles,
}

/// One network of a file whose header was read; `None` if the file does not hold it.
fn extract<C: DeserializeOwned>(
    weights: &Weights,
    part: Part,
    files: &WeightFiles,
    infer: impl Fn(&Weights) -> Result<C, String>,
) -> Result<Option<Component<C>>> {
    let Some(own) = named(weights, part).transpose()? else { return Ok(None) };
    let config = match metadata_config(weights, part.name())? {
        Some(config) => config,
        None => infer(&own).map_err(|message| Error::ModelUnsupported {
            name: weights.path(0).display().to_string(),
            message: format!("its `{}` has an unknown layout: {message}", part.name()),
        })?,
    };
    let bytes = own.tensors().map(|(_, stored)| Bytes(stored.range.end - stored.range.start)).sum();
    Ok(Some(Component { config, weights: WeightFiles { bytes: Some(bytes), ..files.clone() } }))
}

impl CheckpointBuilder {
    /// Starts from a single file.
    ///
    /// # Errors
    /// `model_unsupported` for a file that is not an SDXL model, `model_corrupt`, `unsafe_format`.
    pub(crate) fn single(name: &str, key: CheckpointKey, files: WeightFiles) -> Result<Self> {
        let found = files.files.first().ok_or_else(|| Error::bug("a single file without a file"))?;
        let weights = look(found)?;
        check_tensor_count(&weights, name)?;
        if !identify::is_sdxl(&weights) {
            return Err(Error::ModelUnsupported { name: name.to_owned(), message: identify::describe(&weights) });
        }
        let FileTraining { variant, scheduler, .. } = FileTraining::read(&weights)?;
        let latents = latent_scale(&weights, variant)?;
        let index: Option<ModelIndexFields> = metadata_config(&weights, "model_index")?;
        let (pipeline, force_zeros) =
            index.map_or((None, None), |index| (index.class_name, index.force_zeros_for_empty_prompt));
        let scaled = |weights: &Weights| infer_config::vae(weights).map(|config| with_latent_scale(config, &latents));
        let vae = extract(&weights, Part::Vae, &files, scaled)?;
        Ok(Self {
            name: name.to_owned(),
            key,
            pipeline,
            force_zeros_for_empty_prompt: force_zeros,
            scales_image: scheduler.is_edm(),
            scheduler,
            variant,
            tokenizers: [None, None],
            text_encoder: extract(&weights, Part::TextEncoder, &files, infer_config::clip)?,
            text_encoder_2: extract(&weights, Part::TextEncoder2, &files, infer_config::clip)?,
            unet: extract(&weights, Part::Unet, &files, infer_config::unet)?,
            latents: vae.as_ref().map_or(latents, |vae| vae.config.clone()),
            vae,
        })
    }

    /// Replaces `part` by that of another file or folder.
    ///
    /// # Errors
    /// `model_unsupported` if the file lacks the part, `model_corrupt`, `unsafe_format`.
    pub(crate) fn replace(&mut self, part: Part, other: &ComponentFile) -> Result<()> {
        let weights = header_of(part, other)?;
        let mut read = Vec::new();
        match part {
            Part::TextEncoder => self.text_encoder = Some(replacement(&weights, part, other, infer_config::clip)?),
            Part::TextEncoder2 => self.text_encoder_2 = Some(replacement(&weights, part, other, infer_config::clip)?),
            Part::Vae => {
                let latents = &self.latents;
                let scaled =
                    |weights: &Weights| infer_config::vae(weights).map(|config| with_latent_scale(config, latents));
                self.vae = Some(replacement(&weights, part, other, scaled)?);
            }
            Part::Unet => {
                self.unet = Some(replacement(&weights, part, other, infer_config::unet)?);
                read = self.adopt_training(&weights, other)?;
            }
        }
        let mut hasher = DefaultHasher::new();
        read.iter().for_each(|file| (file.path(), file.stamp()).hash(&mut hasher));
        (self.key, part, other.key).hash(&mut hasher);
        self.key = CheckpointKey(hasher.finish());
        Ok(())
    }

    /// Takes over the training of a UNet that replaces this checkpoint's. Returns the configuration files that were read.
    fn adopt_training(&mut self, weights: &Weights, other: &ComponentFile) -> Result<Vec<ModelFile>> {
        let (training, read) = match other.model_folder(Part::Unet) {
            Some(folder) => UnetTraining::from_folder(&folder).map(|(training, read)| (Some(training), read))?,
            None => (UnetTraining::from_file(weights, self.variant)?, Vec::new()),
        };
        let Some(UnetTraining { scales_image, scheduler, variant, latents }) = training else { return Ok(read) };
        (self.scales_image, self.variant, self.scheduler) = (scales_image, variant, scheduler);
        if let Some(latents) = latents {
            // The autoencoder stays, and reads latents of the UNet's scale.
            if let Some(vae) = &mut self.vae {
                vae.config = with_latent_scale(std::mem::take(&mut vae.config), &latents);
            }
            self.latents = latents;
        }
        Ok(read)
    }

    /// Checks that the checkpoint is complete and that its components fit together.
    ///
    /// # Errors
    /// `model_unsupported`.
    pub(crate) fn finish(mut self) -> Result<Checkpoint> {
        let Networks { text_encoder, text_encoder_2, unet, vae, family } = self.networks()?;
        let mut weights = Vec::new();
        let text_encoder = text_encoder.map(|Component { config, weights: files }| {
            weights.push((Part::TextEncoder, files));
            config
        });
        weights.push((Part::TextEncoder2, text_encoder_2.weights));
        weights.push((Part::Unet, unet.weights));
        weights.push((Part::Vae, vae.weights));
        Ok(Checkpoint {
            name: self.name,
            key: self.key,
            family,
            variant: self.variant.map(|variant| variant.name),
            pipeline: self.pipeline.unwrap_or_else(|| family.pipelines.first().copied().unwrap_or_default().to_owned()),
            // The values of the published refiner and base.
            force_zeros_for_empty_prompt: self.force_zeros_for_empty_prompt.unwrap_or(family.first_encoder),
            scales_image: self.scales_image,
            text_encoder,
            text_encoder_2: text_encoder_2.config,
            unet: unet.config,
            vae: vae.config,
            scheduler: self.scheduler,
            revision: None,
            mmap: true,
            tokenizers: self.tokenizers,
            weights,
        })
    }

    /// The networks, if none is missing and they fit together.
    fn networks(&mut self) -> Result<Networks> {
        let name = self.name.clone();
        let unsupported = |message: String| Error::ModelUnsupported { name: name.clone(), message };
        let Some(unet) = self.unet.take() else {
            return Err(unsupported("it has no `unet`, and every SDXL model has one".to_owned()));
        };
        unet.config.check(&format!("{name}/{}", Part::Unet.name()))?;
        let context = unet.config.context_channels();
        let second_width = self.text_encoder_2.as_ref().map_or(BIG_CLIP_WIDTH, |second| second.config.hidden_size);
        let needs_first = context != second_width;
        let missing = self.missing(needs_first);
        let (Some(second), Some(vae), true) = (self.text_encoder_2.take(), self.vae.take(), missing.is_empty()) else {
            let list = missing.join("` and no `");
            let fields = missing.iter().map(|part| format!("\"{part}\": \"FILE\"")).collect::<Vec<_>>().join(", ");
            return Err(unsupported(format!("it has no `{list}`: name files that have, as {fields}")));
        };
        let first = self.text_encoder.take().filter(|_| needs_first);
        let channels = unet.config.in_channels;
        let family = Family::detect(first.is_some(), channels, &unet.config.depths()?).ok_or_else(|| {
            let known = FAMILIES.iter().map(|(name, family)| format!("{name} ({})", family.channels));
            let known = known.collect::<Vec<_>>().join(", ");
            unsupported(format!("its UNet takes {channels} channels, and this worker knows {known}"))
        })?;
        for (part, encoder) in [(Part::TextEncoder, first.as_ref()), (Part::TextEncoder2, Some(&second))] {
            encoder.map_or(Ok(()), |encoder| encoder.config.check(&format!("{name}/{}", part.name())))?;
        }
        let width = second.config.hidden_size + first.as_ref().map_or(0, |first| first.config.hidden_size);
        if width != context {
            let message = format!("its UNet reads {context} channels of text, and its text encoders give {width}");
            return Err(unsupported(message));
        }
        vae.config.check(&format!("{name}/{}", Part::Vae.name()))?;
        Ok(Networks { text_encoder: first, text_encoder_2: second, unet, vae, family })
    }

    /// Names of missing networks besides the UNet.
    fn missing(&self, needs_first: bool) -> Vec<&'static str> {
        let parts = [
            (Part::TextEncoder, needs_first && self.text_encoder.is_none()),
            (Part::TextEncoder2, self.text_encoder_2.is_none()),
            (Part::Vae, self.vae.is_none()),
        ];
        parts.into_iter().filter(|(_, missing)| *missing).map(|(part, _)| part.name()).collect()
    }
}

/// The networks of a complete checkpoint.
struct Networks {
    text_encoder: Option<Component<ClipConfig>>,
    text_encoder_2: Component<ClipConfig>,
    unet: Component<UnetConfig>,
    vae: Component<VaeConfig>,
    family: &'static Family,
}

/// The header of the file that holds `part`; a file that is another kind of model is refused.
fn header_of(part: Part, other: &ComponentFile) -> Result<Weights> {
    let refuse = |message: String| Error::ModelUnsupported { name: other.name.clone(), message };
    let files = &other.weights().files;
    let mut first = None;
    for file in files {
        let weights = look(file)?;
        check_tensor_count(&weights, &other.name)?;
        if named(&weights, part).is_some() || files.len() == 1 {
            first = Some(weights);
            break;
        }
    }
    let weights = first.ok_or_else(|| refuse(format!("it holds no `{}`", part.name())))?;
    match identify::kind(&weights) {
        Some(kind) => Err(refuse(format!("it is {kind}, and no `{}`", part.name()))),
        None => Ok(weights),
    }
}

/// Most tensors of a single file; SDXL has about 2500.
const MOST_TENSORS: usize = 20_000;

fn check_tensor_count(weights: &Weights, name: &str) -> Result<()> {
    match weights.tensors().count() {
        0..=MOST_TENSORS => Ok(()),
        count => Err(Error::ModelUnsupported {
            name: name.to_owned(),
            message: format!("it has {count} tensors, and a model has at most {MOST_TENSORS}"),
        }),
    }
}

/// A component from a file or folder that the request names for it.
fn replacement<C: DeserializeOwned>(
    weights: &Weights,
    part: Part,
    other: &ComponentFile,
    infer: impl Fn(&Weights) -> Result<C, String>,
) -> Result<Component<C>> {
    let files = other.weights();
    if let Some(config) = other.config()? {
        return Ok(Component { config, weights: files.clone() });
    }
    if files.files.len() > 1 {
        let message = "it has several files and no `config.json`".to_owned();
        return Err(Error::ModelUnsupported { name: other.name.clone(), message });
    }
    extract(weights, part, files, infer)?.ok_or_else(|| Error::ModelUnsupported {
        name: other.name.clone(),
        message: format!("it holds no `{}`", part.name()),
    })
}

/// `config` with the latent scale of `latents`.
fn with_latent_scale(config: VaeConfig, latents: &VaeConfig) -> VaeConfig {
    VaeConfig {
        scaling_factor: latents.scaling_factor,
        shift_factor: latents.shift_factor,
        latents_mean: latents.latents_mean.clone(),
        latents_std: latents.latents_std.clone(),
        ..config
    }
}
