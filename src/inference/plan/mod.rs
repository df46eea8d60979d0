//! A generation with nothing left to decide.

pub(crate) mod build;
pub(crate) mod controlnet;
pub mod guidance;
pub(crate) mod guidance_build;
pub(crate) mod init_image;
pub(crate) mod instruct_pix2pix;
pub mod memory_estimate;
pub mod memory_policy;
pub(crate) mod passes;

use std::sync::Arc;

use crate::conditioning::hints::HintPlan;
use crate::conditioning::image_adapters::AdapterPlan;
use crate::conditioning::init_image::InitImageOptions;
use crate::conditioning::instructor::PromptOptions;
use crate::device::interface::{Dtype, Quantization};
use crate::inference::interface::GenerateRequest;
use crate::inference::plan::guidance::Guidance;
use crate::inference::request::memory::{MemoryOptions, MemoryPlan};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::LoraChoice;
use crate::noise::{RngKind, Seed};
use crate::postprocessing::instructor::OutputPlan;
use crate::postprocessing::upscaler::{LatentUpscaler, PixelUpscaler};
use crate::scheduler::plan::SamplingPlan;
use crate::units::ImageSize;

/// What the whole recipe needs, decided and checked.
pub struct GenerationPlan {
    pub checkpoint: Arc<Checkpoint>,
    /// What the request asks for; the device policy answers.
    pub dtype: Option<Dtype>,
    /// Likewise.
    pub quantization: Option<Quantization>,
    pub prompt: PromptOptions,
    pub size: ImageSize,
    /// One image each.
    pub seeds: Vec<Seed>,
    pub rng: RngKind,
    pub guidance: Guidance,
    pub sampling: SamplingPlan,
    pub time_ids: TimeIds,
    /// The image that is worked on; text to image has none.
    pub editing: Option<InitImagePlan>,
    /// What follows the first run.
    pub further: Vec<PassPlan>,
    pub controls: Vec<ControlPlan>,
    /// Pictures beside the prompt.
    pub adapters: AdapterPlan,
    /// In the order in which they are applied.
    pub loras: Vec<LoraChoice>,
    pub output: OutputPlan,
    /// What is left open for want of memory, and what was decided.
    pub memory: MemoryOptions,
    pub means: MemoryPlan,
    /// Every value used, as a request that makes the same images.
    pub parameters: GenerateRequest,
}

/// A ControlNet, decided and checked.
pub struct ControlPlan {
    /// Its place in the request.
    pub index: usize,
    /// The same for all that name one network.
    pub net: Arc<ComponentFile>,
    pub hint: HintPlan,
    /// What a union is told that the image is.
    pub kind: Option<usize>,
    pub weight: f64,
    /// Shares of the steps.
    pub start: f64,
    pub end: f64,
    pub guess: bool,
}

/// An image that is worked on.
pub struct InitImagePlan {
    pub canvas: InitImageOptions,
    /// Whether latents are drawn from the encoder's distribution; otherwise its mode is taken.
    pub sampled: bool,
    /// Whether the mask's greys count.
    pub soft: bool,
    /// Whether the run starts from noise alone.
    pub from_noise: bool,
    /// Whether the network sees the image beside latents that are noise alone.
    pub beside: bool,
    /// Whether noise is added to the image; a run that goes on where another stopped adds none.
    pub adds_noise: bool,
}

/// A run that goes on from the latents of the one before.
pub struct PassPlan {
    pub entry: Entry,
    pub checkpoint: Arc<Checkpoint>,
    pub size: ImageSize,
    pub sampling: SamplingPlan,
    pub time_ids: TimeIds,
    pub guidance: Guidance,
}

/// How latents enter a further run.
#[derive(Clone, Copy)]
pub enum Entry {
    /// As they are, half denoised.
    Carried,
    /// Enlarged as latents, with fresh noise.
    Latents(&'static LatentUpscaler),
    /// Decoded, enlarged as a picture and encoded, with fresh noise.
    Pixels(&'static PixelUpscaler),
}

impl GenerationPlan {
    /// Steps of all runs of one image.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.sampling.steps() + self.further.iter().map(|further| further.sampling.steps()).sum::<usize>()
    }

    /// The size at which the image is decoded.
    #[must_use]
    pub fn last_size(&self) -> ImageSize {
        self.further.last().map_or(self.size, |further| further.size)
    }
}

/// The six numbers of SDXL's size conditioning, in pixels: original height and width, crop top and left, target height
/// and width. The refiner reads the first four and an aesthetic score in place of the last two.
#[derive(Clone, Debug, PartialEq)]
pub struct TimeIds {
    pub positive: Vec<f64>,
    pub negative: Vec<f64>,
}
