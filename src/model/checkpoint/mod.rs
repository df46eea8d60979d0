//! A checkpoint, and how one in the diffusers folder layout is understood from its small files; its weights are not read
//! here.

pub(crate) mod builder;
pub mod families;
pub(crate) mod identify;
pub(crate) mod infer_config;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Deserialize;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::catalog::demo;
use crate::model::catalog::files::{Folder, Found};
use crate::model::checkpoint::builder::{Draft, Piece};
use crate::model::checkpoint::families::Family;
use crate::model::checkpoint::families::variants::Variant;
use crate::model::hub::Reference;
use crate::model::networks::PerBlock;
use crate::model::networks::clip::ClipConfig;
use crate::model::networks::unet::{Unet, UnetConfig};
use crate::model::networks::vae::VaeConfig;
use crate::model::weights::extract::NamePart;
use crate::model::weights::open::{Open, OpenTask, Weights};
use crate::roots::Roots;
use crate::scheduler::config::SchedulerConfig;
use crate::units::{Bytes, ImageSize};

/// Longest configuration file.
pub(crate) const CONFIG_LIMIT: u64 = 4 * Bytes::MIB;
/// Longest index of a sharded network.
const INDEX_LIMIT: u64 = 64 * Bytes::MIB;
/// Rows and columns of latents where `unet/config.json` does not say: SDXL was trained at 1024 pixels.
const USUAL_LATENTS: usize = 128;
/// Variants whose files carry the name of their number format.
pub(crate) const VARIANTS: [&str; 2] = ["fp16", "bf16"];

/// What tells one state of one checkpoint from every other: where it lies, and the length and time of every file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CheckpointKey(pub(crate) u64);

impl CheckpointKey {
    /// Of what tells one thing that is kept from every other.
    pub(crate) fn of(what: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Self(hasher.finish())
    }

    /// Whether it is what a resident says of itself.
    #[must_use]
    pub fn is(self, told: Option<u64>) -> bool {
        told == Some(self.0)
    }
}

/// The networks of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    TextEncoder,
    TextEncoder2,
    Unet,
    Vae,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::TextEncoder, Self::TextEncoder2, Self::Unet, Self::Vae];

    /// The name of its folder and on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::Unet => "unet",
            Self::Vae => "vae",
        }
    }

    /// How its weight files begin.
    pub(crate) fn stem(self) -> &'static str {
        match self {
            Self::TextEncoder | Self::TextEncoder2 => "model",
            Self::Unet | Self::Vae => "diffusion_pytorch_model",
        }
    }
}

/// A complete SDXL checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// What requests call it.
    pub name: String,
    pub key: CheckpointKey,
    pub family: &'static Family,
    /// How it was trained or distilled, where its files say: a name of [`crate::model::checkpoint::families::variants::VARIANTS`].
    pub variant: Option<&'static str>,
    /// `_class_name` of `model_index.json`.
    pub pipeline: String,
    /// Whether a missing negative prompt means zeros rather than the encoded empty text.
    pub force_zeros_for_empty_prompt: bool,
    /// Whether the image that the model edits is scaled as its latents are; only CosXL's is.
    pub scales_image: bool,
    /// CLIP ViT-L; the refiner has none.
    pub text_encoder: Option<ClipConfig>,
    /// OpenCLIP ViT-bigG.
    pub text_encoder_2: ClipConfig,
    pub unet: UnetConfig,
    pub vae: VaeConfig,
    pub scheduler: SchedulerConfig,
    /// The commit of the repository of the hub that it is, for one that is.
    pub revision: Option<String>,
    /// Whether weights on disk may be mapped rather than read.
    pub mmap: bool,
    pub(crate) tokenizers: [Option<TokenizerFiles>; 2],
    pub(crate) weights: Vec<(Part, WeightFiles)>,
}

/// The vocabulary of one tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct TokenizerFiles {
    pub(crate) vocab: Found,
    pub(crate) merges: Found,
    /// `tokenizer_config.json`
    pub(crate) config: Option<Found>,
}

#[derive(Clone, Debug)]
pub(crate) struct WeightFiles {
    pub(crate) files: Vec<Found>,
    /// Tensor name → file name, for a sharded network.
    pub(crate) index: Option<HashMap<String, String>>,
    /// Of the network's own tensors, where a file holds several networks.
    pub(crate) bytes: Option<Bytes>,
}

impl WeightFiles {
    pub(crate) fn of(files: Vec<Found>) -> Self {
        Self { files, index: None, bytes: None }
    }

    pub(crate) fn size(&self) -> Bytes {
        self.bytes.unwrap_or_else(|| self.files.iter().map(|found| Bytes(found.stamp().0)).sum())
    }
}

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class_name: String,
    #[serde(default = "yes")]
    force_zeros_for_empty_prompt: bool,
    #[serde(default)]
    is_cosxl_edit: bool,
    text_encoder: Option<Component>,
    text_encoder_2: Option<Component>,
    unet: Option<Component>,
    vae: Option<Component>,
}

/// Library and class; both null for a part that the pipeline goes without.
type Component = (Option<String>, Option<String>);

/// diffusers' default of `force_zeros_for_empty_prompt`.
fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// The embedded demonstration model.
    ///
    /// # Errors
    /// None, unless the binary was built from damaged assets.
    pub fn demo() -> Result<Self> {
        Self::read(demo::NAME, &Folder::Embedded)?.finish()
    }

    /// Understands the folder `path`, which lies beneath `roots`; requests call it `name`.
    ///
    /// # Errors
    /// `model_unsupported` for what is not SDXL, `unsafe_format` for pickle weights, `model_corrupt` for missing or
    /// broken files, `path_not_allowed` for links out of the roots.
    pub fn open_folder(name: &str, path: &std::path::Path, roots: &Roots) -> Result<Self> {
        Self::read(name, &Folder::Disk { path: path.to_owned(), roots: roots.clone() })?.finish()
    }

    /// Whether the folder `path` says that it is SDXL. A file that cannot be read says nothing.
    #[must_use]
    pub(crate) fn claims_sdxl(path: &std::path::Path) -> bool {
        let index = Found::Disk(path.join("model_index.json")).json::<ModelIndex>(CONFIG_LIMIT);
        index.is_ok_and(|index| Family::knows(&index.class_name))
    }

    /// Whether the folder `path` lacks files that a model has, as one that was downloaded in part does.
    #[must_use]
    pub(crate) fn lacks_files(path: &std::path::Path) -> bool {
        let Ok(index) = Found::Disk(path.join("model_index.json")).json::<ModelIndex>(CONFIG_LIMIT) else {
            return true;
        };
        let lacks = |(part, component): (Part, &Option<Component>)| {
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

    /// What a request calls it that names the revision beside it.
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
        let side = |place: usize| {
            let latents = sides.get(place).or(sides.first()).copied().unwrap_or(USUAL_LATENTS);
            latents.saturating_mul(scale)
        };
        ImageSize { width: side(1), height: side(0) }
    }

    /// Whether its UNet takes mask and masked image beside the latents.
    #[must_use]
    pub fn takes_mask(&self) -> bool {
        self.family.masks
    }

    /// Whether it brings tokenizers of its own.
    #[must_use]
    pub fn own_tokenizers(&self) -> bool {
        self.tokenizers.iter().flatten().any(|files| matches!(files.vocab, Found::Disk(_)))
    }

    /// Whether it is the embedded model, every part of it.
    pub(crate) fn is_demo(&self) -> bool {
        let embedded = |found: &Found| matches!(found, Found::Embedded { .. });
        self.weights.iter().flat_map(|(_, files)| &files.files).all(embedded)
    }

    /// Bytes of its weight files.
    #[must_use]
    pub fn file_bytes(&self) -> Bytes {
        self.weights.iter().map(|(_, files)| files.size()).sum()
    }

    /// Bytes by which the UNet is smaller with INT8 weights than its files.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn int8_saves(&self, ctx: &Context) -> Result<Bytes> {
        let weights = self.open(Part::Unet, ctx)?;
        let saved = weights.tensors().filter_map(|(name, stored)| {
            let layer = name.strip_suffix(".weight")?;
            let elements: u64 = stored.shape.iter().map(|&side| side as u64).product();
            let chosen = stored.shape.len() > 1 && Unet::bears_int8(layer, &stored.shape);
            chosen.then(|| Bytes((stored.range.end - stored.range.start).saturating_sub(elements)))
        });
        Ok(saved.sum())
    }

    /// The networks that it has.
    pub fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        self.weights.iter().map(|(part, _)| *part)
    }

    /// How many files hold the weights of a part.
    #[must_use]
    pub fn file_count(&self, part: Part) -> usize {
        self.weights.iter().find(|(known, _)| *known == part).map_or(0, |(_, files)| files.files.len())
    }

    /// Opens the weights of a part and checks their headers.
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

    pub(crate) fn read(name: &str, folder: &Folder) -> Result<Draft> {
        let unsupported = |message: String| Error::ModelUnsupported { name: name.to_owned(), message };
        let mut files = Vec::new();
        let Some(found) = folder.find("model_index.json")? else {
            return Err(unsupported(
                "it is no model in the diffusers folder layout: `model_index.json` is missing".into(),
            ));
        };
        let index: ModelIndex = found.json(CONFIG_LIMIT)?;
        files.push(found);
        if !Family::knows(&index.class_name) {
            return Err(unsupported(format!("it is a `{}`, and this worker runs SDXL", index.class_name)));
        }
        let has = |component: &Option<Component>| matches!(component, Some((_, Some(_))));
        for (part, component) in
            [(Part::TextEncoder2, &index.text_encoder_2), (Part::Unet, &index.unet), (Part::Vae, &index.vae)]
        {
            if !has(component) {
                return Err(unsupported(format!("it has no `{}`, and every SDXL model has one", part.name())));
            }
        }
        let mut piece = |part: Part| -> Result<(Found, WeightFiles)> {
            let config = folder.need(&format!("{}/config.json", part.name()))?;
            let weights = weight_files(folder, part.name(), part.stem())?;
            files.push(config.clone());
            files.extend(weights.files.iter().cloned());
            Ok((config, weights))
        };
        let first = has(&index.text_encoder).then(|| piece(Part::TextEncoder)).transpose()?;
        let (second, unet, vae) = (piece(Part::TextEncoder2)?, piece(Part::Unet)?, piece(Part::Vae)?);
        let scheduler = folder.need("scheduler/scheduler_config.json")?;
        files.push(scheduler.clone());
        let tokenizers = [tokenizer_files(folder, "tokenizer")?, tokenizer_files(folder, "tokenizer_2")?];
        for tokenizer in tokenizers.iter().flatten() {
            files.extend([&tokenizer.vocab, &tokenizer.merges].into_iter().chain(&tokenizer.config).cloned());
        }
        let (vae, scheduler): (Piece<VaeConfig>, SchedulerConfig) = (typed(vae)?, scheduler.json(CONFIG_LIMIT)?);
        Ok(Draft {
            name: name.to_owned(),
            key: key(folder, &files),
            pipeline: Some(index.class_name),
            force_zeros_for_empty_prompt: Some(index.force_zeros_for_empty_prompt),
            scales_image: index.is_cosxl_edit,
            variant: Variant::scheduled(&scheduler),
            scheduler,
            tokenizers,
            text_encoder: first.map(typed).transpose()?,
            text_encoder_2: Some(typed(second)?),
            unet: Some(typed(unet)?),
            latents: vae.config.clone(),
            vae: Some(vae),
        })
    }
}

/// A network whose configuration is understood.
fn typed<T: serde::de::DeserializeOwned>((config, weights): (Found, WeightFiles)) -> Result<Piece<T>> {
    Ok(Piece { config: config.json(CONFIG_LIMIT)?, weights })
}

pub(crate) fn key(folder: &Folder, files: &[Found]) -> CheckpointKey {
    let mut hasher = DefaultHasher::new();
    folder.path("").hash(&mut hasher);
    for found in files {
        found.path().hash(&mut hasher);
        found.stamp().hash(&mut hasher);
    }
    CheckpointKey(hasher.finish())
}

/// The path of a file in `dir`, which is the folder itself where it is empty.
fn place(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

/// The files of a part. The one without a variant's name is preferred, as diffusers prefers it.
pub(crate) fn weight_files(folder: &Folder, dir: &str, stem: &str) -> Result<WeightFiles> {
    let mut candidates = vec![(format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json"))];
    for variant in VARIANTS {
        candidates.push((format!("{stem}.{variant}.safetensors"), format!("{stem}.safetensors.index.{variant}.json")));
    }
    for (single, index) in &candidates {
        if let Some(found) = folder.find(&place(dir, single))? {
            return Ok(WeightFiles::of(vec![found]));
        }
        if let Some(found) = folder.find(&place(dir, index))? {
            return sharded(folder, dir, &found);
        }
    }
    let names = folder.names(dir);
    let pickle = |name: &&String| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|end| name.to_lowercase().ends_with(end));
    match names.iter().find(pickle) {
        Some(name) => Err(Error::UnsafeFormat { path: folder.path(&place(dir, name)) }),
        None => Err(Error::ModelCorrupt {
            path: folder.path(dir),
            message: format!("has no weights: `{stem}.safetensors` is missing"),
        }),
    }
}

fn sharded(folder: &Folder, dir: &str, found: &Found) -> Result<WeightFiles> {
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
            return Err(corrupt(format!("must name safetensors files of its own folder, and names `{name}`")));
        }
        files.push(folder.need(&place(dir, name))?);
    }
    Ok(WeightFiles { index: Some(weight_map), ..WeightFiles::of(files) })
}

fn tokenizer_files(folder: &Folder, dir: &str) -> Result<Option<TokenizerFiles>> {
    let vocab = folder.find(&format!("{dir}/vocab.json"))?;
    let merges = folder.find(&format!("{dir}/merges.txt"))?;
    let config = folder.find(&format!("{dir}/tokenizer_config.json"))?;
    Ok(match (vocab, merges) {
        (Some(vocab), Some(merges)) => Some(TokenizerFiles { vocab, merges, config }),
        _ => None,
    })
}
