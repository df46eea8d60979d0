//! A request with every default filled in and every check passed: [`GenerationPlan`].

pub(crate) mod build;
pub(crate) mod controlnet;
pub(crate) mod echo;
pub mod guidance;
pub(crate) mod infotext;
pub(crate) mod init_image;
pub(crate) mod instruct_pix2pix;
pub(crate) mod limits;
pub(crate) mod lora;
pub mod memory_estimate;
pub mod memory_policy;
pub(crate) mod operation;
pub(crate) mod passes;
pub(crate) mod seeds;
pub(crate) mod size;

use std::sync::Arc;

use crate::conditioning::hints::HintPlan;
use crate::conditioning::image_adapters::AdapterPlan;
use crate::conditioning::init_image::InitImageOptions;
use crate::conditioning::prompt_options::PromptOptions;
use crate::device::interface::{Dtype, Quantization};
use crate::inference::plan::guidance::GuidanceOptions;
use crate::inference::request::generate::GenerateRequest;
use crate::inference::request::lora::LoraList;
use crate::inference::request::memory::{MemoryOptions, MemoryPlan};
use crate::inference::workers::guidance::Guidance;
use crate::inference::workers::prepare::TimeIds;
use crate::inference::workers::step::StepSpan;
use crate::layers::Resident;
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::LoraChoice;
use crate::noise::{RngKind, Seed};
use crate::postprocessing::instructor::OutputPlan;
use crate::postprocessing::upscaler::{LatentUpscaler, PixelUpscaler};
use crate::scheduler::plan::SamplingPlan;
use crate::units::ImageSize;

/// A generation with nothing left to decide.
pub struct GenerationPlan {
    /// The request's model. Its VAE encodes and decodes in every pass.
    pub checkpoint: Arc<Checkpoint>,
    /// Compute dtype that the request names; once the device is known, the one that it computes in.
    pub dtype: Option<Dtype>,
    /// The same for quantization.
    pub quantization: Option<Quantization>,
    pub prompt: PromptOptions,
    /// One image each.
    pub seeds: Vec<Seed>,
    pub rng: RngKind,
    /// Denoising passes of one image in their order, at least one.
    pub passes: Vec<PassPlan>,
    pub hires: Option<HiresPlan>,
    /// Share of the noise levels at which the refiner takes over.
    pub switch_at: Option<f64>,
    pub controlnets: Vec<ControlNetPlan>,
    /// T2I-Adapters and IP-Adapters.
    pub adapters: AdapterPlan,
    /// In the order in which they are applied.
    pub loras: Vec<LoraChoice>,
    pub output: OutputPlan,
    /// Memory choices that the request leaves open.
    pub memory: MemoryOptions,
    /// Memory choices in effect.
    pub memory_plan: MemoryPlan,
    /// Options of the request, completed with their defaults.
    pub guidance_options: GuidanceOptions,
    /// LoRAs of the request and its prompt, completed with their defaults.
    pub lora_options: Option<LoraList>,
    /// The request; its adapters are completed with their defaults.
    pub request: GenerateRequest,
}

/// One denoising pass over latents.
pub struct PassPlan {
    pub entry: PassEntry,
    pub checkpoint: Arc<Checkpoint>,
    pub size: ImageSize,
    pub sampling: SamplingPlan,
    pub time_ids: TimeIds,
    pub guidance: Guidance,
}

/// The source of a pass's first sample.
pub enum PassEntry {
    /// Noise alone.
    Noise,
    /// The request's image.
    Image(Box<InitImagePlan>),
    /// Latents of the pass before, enlarged as latents, with fresh noise.
    Latents(&'static LatentUpscaler),
    /// Latents of the pass before, decoded, enlarged as an image and encoded, with fresh noise.
    Pixels(&'static PixelUpscaler),
    /// Latents of the pass before, half denoised, as they are.
    Carried,
}

/// An image that the first pass starts from.
pub struct InitImagePlan {
    pub options: InitImageOptions,
    /// Share of the steps that are taken; `None` if `denoising_start` sets them, or the model is instruct-pix2pix.
    pub strength: Option<f64>,
    /// True if latents are sampled from the encoder's distribution; otherwise its mode is taken.
    pub sampled: bool,
    /// True if the mask's greys count.
    pub soft_mask: bool,
    /// True if the pass starts from noise alone.
    pub from_noise: bool,
    /// True if the image's latents are concatenated with the sample, as instruct-pix2pix models take them.
    pub concat: bool,
    /// True if noise is added to the image; with `denoising_start` it holds its noise already.
    pub adds_noise: bool,
}

/// The second, larger pass, as the request states it.
pub struct HiresPlan {
    pub strength: f64,
    pub scale: f64,
    /// Its name on the wire.
    pub upscaler: &'static str,
}

/// A ControlNet and its image, decided and checked.
pub struct ControlNetPlan {
    /// Position in the request's list.
    pub index: usize,
    /// Shared by all entries that name one network.
    pub file: Arc<ComponentFile>,
    pub hint: HintPlan,
    /// Control type of a ControlNet Union.
    pub control_type: Option<usize>,
    pub weight: f64,
    /// Shares of the steps between which it is applied.
    pub start: f64,
    pub end: f64,
    pub guess_mode: bool,
}

impl PassPlan {
    /// True if the pass continues the denoising of the one before.
    #[must_use]
    pub fn is_carried(&self) -> bool {
        matches!(self.entry, PassEntry::Carried)
    }

    /// Positions of its latents.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.size.width * self.size.height / 64
    }
}

impl GenerationPlan {
    /// The first pass.
    #[must_use]
    pub fn first(&self) -> &PassPlan {
        &self.passes[0]
    }

    /// The pass whose latents become the image.
    #[must_use]
    pub fn last(&self) -> &PassPlan {
        self.passes.last().unwrap_or_else(|| self.first())
    }

    /// The image that the first pass starts from.
    #[must_use]
    pub fn init_image(&self) -> Option<&InitImagePlan> {
        match &self.first().entry {
            PassEntry::Image(init_image) => Some(init_image),
            _ => None,
        }
    }

    /// Steps of all passes of one image.
    #[must_use]
    pub fn steps(&self) -> usize {
        steps(&self.passes)
    }

    /// Position of pass `index` among the steps over which prompt schedules and guidance run: a pass and those that
    /// carry its latents on share one schedule.
    #[must_use]
    pub fn span(&self, index: usize) -> StepSpan {
        let first = (0..=index).rev().find(|&at| !self.passes[at].is_carried()).unwrap_or(0);
        let carried = self.passes[index + 1..].iter().take_while(|pass| pass.is_carried()).count();
        StepSpan { before: steps(&self.passes[first..index]), steps: steps(&self.passes[first..=index + carried]) }
    }

    /// True if another pass continues the denoising of pass `index`.
    #[must_use]
    pub fn continues(&self, index: usize) -> bool {
        self.passes.get(index + 1).is_some_and(PassPlan::is_carried)
    }

    /// True if the networks of pass `index` are those that ControlNets, adapters and LoRAs of the request belong to.
    #[must_use]
    pub fn is_own_model(&self, pass: &PassPlan) -> bool {
        pass.checkpoint.key == self.checkpoint.key
    }

    /// True if a loaded network belongs to the generation.
    #[must_use]
    pub fn uses(&self, resident: &Resident) -> bool {
        let name = &resident.name;
        self.passes.iter().any(|pass| pass.checkpoint.name == *name)
            || (resident.kind == "controlnet" && self.controlnets.iter().any(|one| one.file.name == *name))
            || self.adapters.names().any(|adapter| adapter == name)
    }
}

fn steps(passes: &[PassPlan]) -> usize {
    passes.iter().map(|pass| pass.sampling.steps()).sum()
}
