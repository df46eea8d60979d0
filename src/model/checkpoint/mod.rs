//! An SDXL checkpoint: its configuration and files, from a diffusers folder, a single file, or replaced parts.

pub(crate) mod builder;
mod diffusers_folder;
pub mod families;
pub(crate) mod files;
pub(crate) mod identify;
pub(crate) mod infer_config;
pub(crate) mod key;
pub(crate) mod part;
pub(crate) mod training;

pub use key::CheckpointKey;
pub use part::Part;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::catalog::files::ModelFile;
use crate::model::checkpoint::families::Family;
use crate::model::checkpoint::files::{TokenizerFiles, WeightFiles};
use crate::model::hub::reference::Reference;
use crate::model::networks::PerBlock;
use crate::model::networks::clip::ClipConfig;
use crate::model::networks::unet::UnetConfig;
use crate::model::networks::vae::VaeConfig;
use crate::model::weights::extract::NamePart;
use crate::model::weights::open::{Open, OpenTask, Weights};
use crate::scheduler::config::SchedulerConfig;
use crate::units::{Bytes, ImageSize};

/// Rows and columns of latents if `unet/config.json` gives no `sample_size`: SDXL was trained at 1024 pixels.
const DEFAULT_SAMPLE_SIZE: usize = 128;

/// A complete SDXL checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its name in requests.
    pub name: String,
    pub key: CheckpointKey,
    pub family: &'static Family,
    /// Training or distillation, if its files declare it: a name in [`families::variants::VARIANTS`].
    pub variant: Option<&'static str>,
    /// `_class_name` of `model_index.json`.
    pub pipeline: String,
    /// True if a missing negative prompt is embedded as zeros instead of as an empty text.
    pub force_zeros_for_empty_prompt: bool,
    /// True if the image to edit is scaled like latents; only CosXL does this.
    pub scales_image: bool,
    /// CLIP ViT-L; the refiner has none.
    pub text_encoder: Option<ClipConfig>,
    /// OpenCLIP ViT-bigG.
    pub text_encoder_2: ClipConfig,
    pub unet: UnetConfig,
    pub vae: VaeConfig,
    pub scheduler: SchedulerConfig,
    /// The commit, for a repository of the hub.
    pub revision: Option<String>,
    /// True if weight files may be mapped into memory.
    pub mmap: bool,
    pub(crate) tokenizers: [Option<TokenizerFiles>; 2],
    pub(crate) weights: Vec<(Part, WeightFiles)>,
}

impl Checkpoint {
    /// Its name in requests, without the revision.
    #[must_use]
    pub fn base_name(&self) -> String {
        match (&self.revision, Reference::parse(&self.name, "model")) {
            (Some(_), Ok(Some(reference))) => Reference { revision: None, ..reference }.to_string(),
            _ => self.name.clone(),
        }
    }

    /// The shape of the images it was trained on, in pixels.
    #[must_use]
    pub fn default_size(&self) -> ImageSize {
        let sides = self.unet.sample_size.as_ref().map_or(&[][..], PerBlock::values);
        let scale = self.vae.reduction();
        let side = |axis: usize| {
            let latents = sides.get(axis).or(sides.first()).copied().unwrap_or(DEFAULT_SAMPLE_SIZE);
            latents.saturating_mul(scale)
        };
        ImageSize { width: side(1), height: side(0) }
    }

    /// True if its UNet takes mask and masked image concatenated with the latents.
    #[must_use]
    pub fn takes_mask(&self) -> bool {
        self.family.masks
    }

    /// True if it has its own tokenizers.
    #[must_use]
    pub fn own_tokenizers(&self) -> bool {
        self.tokenizers.iter().flatten().any(|files| matches!(files.vocab, ModelFile::Disk(_)))
    }

    /// True if every component is of the embedded model.
    pub(crate) fn is_demo(&self) -> bool {
        let embedded = |found: &ModelFile| matches!(found, ModelFile::Embedded { .. });
        self.weights.iter().flat_map(|(_, files)| &files.files).all(embedded)
    }

    /// Bytes of its weight files.
    #[must_use]
    pub fn file_bytes(&self) -> Bytes {
        self.weights.iter().map(|(_, files)| files.size()).sum()
    }

    /// Its networks.
    pub fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        self.weights.iter().map(|(part, _)| *part)
    }

    /// The number of weight files of a component.
    #[must_use]
    pub fn file_count(&self, part: Part) -> usize {
        self.weights.iter().find(|(known, _)| *known == part).map_or(0, |(_, files)| files.files.len())
    }

    /// Opens the weights of a component and checks their headers.
    ///
    /// # Errors
    /// `model_corrupt` with the file at fault; `cancelled`, `deadline_exceeded`.
    pub fn open(&self, part: Part, ctx: &Context) -> Result<Weights> {
        let (_, files) = self.weights.iter().find(|(known, _)| *known == part).ok_or_else(|| {
            Error::ModelUnsupported { name: self.name.clone(), message: format!("it has no `{}`", part.name()) }
        })?;
        let task = OpenTask { files: &files.files, index: files.index.as_ref(), mmap: self.mmap };
        ctx.perform(&NamePart(part), ctx.perform(&Open, task)?)
    }
}
