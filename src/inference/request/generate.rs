//! The fields of a generation, as AUTOMATIC1111 and diffusers name them.

use serde::{Deserialize, Serialize};

use crate::conditioning::image_adapters::{IpAdapterOptions, T2iAdapterOptions};
use crate::conditioning::init_image::{InpaintingFill, Margins, ResizeMode};
use crate::conditioning::interface::{EmbeddingRequest, PromptWeighting};
use crate::device::interface::{Dtype, Quantization};
use crate::image::source::ImageSource;
use crate::inference::request::controlnet::ControlNetOptions;
use crate::inference::request::guidance::{DynamicThresholdingOptions, FreeUOptions, SkipLayerOptions};
use crate::inference::request::lora::LoraList;
use crate::inference::request::memory::{DecodeExtent, Offload};
use crate::layers::OneOrMany;
use crate::noise::RngKind;
use crate::postprocessing::interface::OutputOptions;
use crate::scheduler::config::Prediction;

/// One generation. Everything but `prompt` may be left out; the defaults used stand in the result's `parameters`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct GenerateRequest {
    /// What the image shall show, in AUTOMATIC1111's syntax. Beyond 75 tokens it goes on in further chunks.
    pub prompt: Option<String>,
    /// For the second text encoder. Default: `prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_2: Option<String>,
    /// What the image shall not show. Default: none, which is a zero embedding where the checkpoint says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// For the second text encoder. Default: `negative_prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt_2: Option<String>,
    /// Denoising steps, 1 to 1000. Default: 25.
    #[serde(alias = "num_inference_steps", skip_serializing_if = "Option::is_none")]
    pub steps: Option<i64>,
    /// Classifier-free guidance, 0 to 100; 1.0 and less make one pass only. Default: 5.0.
    #[serde(alias = "guidance_scale", skip_serializing_if = "Option::is_none")]
    pub cfg_scale: Option<f64>,
    /// Guidance towards `init_image`, 1 to 100, of models that edit an image (`sdxl_instruct_pix2pix`); it takes effect, as
    /// a third pass, where `cfg_scale` is above 1. Default: 1.5 for such models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_guidance_scale: Option<f64>,
    /// Share, 0 to 1, by which the guided prediction takes back the conditional one's standard deviation. Default: 0.
    #[serde(alias = "cfg_rescale", skip_serializing_if = "Option::is_none")]
    pub guidance_rescale: Option<f64>,
    /// Shares of the steps, 0 to 1, between which `cfg_scale` applies: from step ⌊start · steps⌋ to before step ⌊end · steps⌋.
    /// The others make one pass only, and so are faster. Default: 0, 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_interval: Option<[f64; 2]>,
    /// Perturbed-attention guidance, 0 to 100, by a further pass. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pag_scale: Option<f64>,
    /// By how much `pag_scale` falls with every timestep below 1000, down to 0; 0 to 100. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pag_adaptive_scale: Option<f64>,
    /// Where attention is perturbed: parts of names of the UNet's transformer blocks, such as `mid`, `up_blocks.0` or
    /// `down_blocks.1.attentions.0`. Default: `["mid"]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pag_applied_layers: Option<Vec<String>>,
    /// Guidance away from a network with layers skipped. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_layer: Option<SkipLayerOptions>,
    /// Dynamic thresholding, for `cfg_scale` above 1. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dynamic_thresholding: Option<DynamicThresholdingOptions>,
    /// Weights of the UNet's backbone and skip connections. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeu: Option<FreeUOptions>,
    /// Sampler, by its own name, AUTOMATIC1111's or diffusers'. Default: the configuration's `default_scheduler`.
    #[serde(alias = "sampler", skip_serializing_if = "Option::is_none")]
    pub sampler_name: Option<String>,
    /// Schedule of sigmas. Default: the checkpoint's spacing, or `leading`.
    #[serde(alias = "schedule_type", skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<String>,
    /// Share of fresh noise a step, 0 to 1, for DDIM. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<f64>,
    /// A schedule of one's own: falling, the last one 0. In place of `steps` and `scheduler`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigmas: Option<Vec<f64>>,
    /// A schedule of one's own: falling timesteps, 999 to 0. In place of `steps` and `scheduler`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timesteps: Option<Vec<f64>>,
    /// What the network predicts. Default: the checkpoint's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction_type: Option<Prediction>,
    /// Rescale the training schedule to end at pure noise. Default: the checkpoint's own.
    #[serde(alias = "rescale_betas_zero_snr", skip_serializing_if = "Option::is_none")]
    pub zero_terminal_snr: Option<bool>,
    /// Of the first image, 0 to 2⁶³-1; each further one adds 1. -1 or left out: random below 2³².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Of the variation of the first image, 0 to 2⁶³-1; each further one adds 1. -1 or left out: random below 2³².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subseed: Option<i64>,
    /// How far the initial noise is turned towards that of `subseed`, 0 to 1. Above 0 all images have `seed` and differ by
    /// `subseed`. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subseed_strength: Option<f64>,
    /// Noise as torch draws it on the CPU, or as CUDA does (`nv`). Default: `cpu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngKind>,
    /// Pixels, a multiple of 8. Default: the UNet's `sample_size` × 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// Pixels, a multiple of 8. Default: the UNet's `sample_size` × 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub height: Option<i64>,
    /// An image to start from. `width` and `height` default to its size, cut to multiples of 8.
    #[serde(alias = "image", skip_serializing_if = "Option::is_none")]
    pub init_image: Option<ImageSource>,
    /// Share of the steps that change `init_image`, 0 to 1: int(steps · strength) are walked. With `enable_hr`, of the
    /// second pass. Default: 0.75.
    #[serde(alias = "strength", skip_serializing_if = "Option::is_none")]
    pub denoising_strength: Option<f64>,
    /// How an image of other proportions is brought to the size: `stretch`, `crop` or `fill`. Default: `stretch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_mode: Option<ResizeMode>,
    /// Whether latents of `init_image` are drawn with the request's noise (`sample`) or are the most likely (`mode`).
    /// Default: `sample`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_sample: Option<VaeSample>,
    /// What of `init_image` is repainted: white. Brought to the image's size.
    #[serde(alias = "mask_image", skip_serializing_if = "Option::is_none")]
    pub mask: Option<ImageSource>,
    /// Standard deviation of the mask's blur in pixels, 0 to 256. Default: 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_blur: Option<f64>,
    /// Black is repainted instead. Default: false.
    #[serde(alias = "inpainting_mask_invert", skip_serializing_if = "Option::is_none")]
    pub mask_invert: Option<bool>,
    /// The mask's greys count in every step; otherwise half and more is masked. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft_mask: Option<bool>,
    /// What the masked part holds at the start: `original`, `fill`, `noise` or `zeros`. Default: `original`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inpainting_fill: Option<InpaintingFill>,
    /// Works on the masked part alone, at `width` × `height`, and puts it back. Default: false.
    #[serde(alias = "only_masked", skip_serializing_if = "Option::is_none")]
    pub inpaint_full_res: Option<bool>,
    /// Pixels around the masked part, 0 to 4096, with `inpaint_full_res`. Default: 32.
    #[serde(alias = "padding_mask_crop", skip_serializing_if = "Option::is_none")]
    pub inpaint_full_res_padding: Option<i64>,
    /// Whether the original's own bytes come back where nothing is masked. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paste_back: Option<bool>,
    /// Pixels by which `init_image` grows on each side; what is new is repainted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extend: Option<Margins>,
    /// Share of the noise levels, 0 to 1, that count as denoised already; no noise is added. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denoising_start: Option<f64>,
    /// Share of the noise levels, 0 to 1, at which denoising stops. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denoising_end: Option<f64>,
    /// A second model for the end of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refiner: Option<RefinerOptions>,
    /// A second pass at a larger size. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_hr: Option<bool>,
    /// How much larger the second pass is, 1 to 8; sizes are cut to multiples of 8. Default: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_scale: Option<f64>,
    /// Width of the second pass in pixels, a multiple of 8, in place of `hr_scale`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_resize_x: Option<i64>,
    /// Height of the second pass in pixels, a multiple of 8, in place of `hr_scale`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_resize_y: Option<i64>,
    /// How the first pass is enlarged: `latent`, `latent_bicubic`, `latent_nearest`, `lanczos` or `bicubic`. Default:
    /// `latent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_upscaler: Option<String>,
    /// Steps of the second pass, before `denoising_strength` cuts them; 0 takes `steps`. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_second_pass_steps: Option<i64>,
    /// The refiner's aesthetic score of the prompt, 0 to 10. Default: 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aesthetic_score: Option<f64>,
    /// The refiner's aesthetic score of the negative prompt, 0 to 10. Default: 2.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_aesthetic_score: Option<f64>,
    /// Images made from this request, `n_iter` times. Default: the configuration's `batch_size`.
    #[serde(alias = "num_images_per_prompt", skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<i64>,
    /// How many batches: `n_iter` · `batch_size` images, all numbered on, at most 64 as shipped. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_iter: Option<i64>,
    /// Layers of the text encoders left out beyond SDXL's penultimate. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<i64>,
    /// How the weights of words act: `a1111`, `compel`, `comfy`; `none`: prompts are plain text. Default: `a1111`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_weighting: Option<PromptWeighting>,
    /// Tokens, 0 to 74: where a chunk of 75 is full, it ends at a comma that stands no farther back. 0: where it is full.
    /// Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comma_padding_backtrack: Option<i64>,
    /// Textual inversions for words of the prompts, at most 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Vec<EmbeddingRequest>>,
    /// Size conditioning: height and width in pixels. Default: the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_size: Option<[i64; 2]>,
    /// Crop conditioning: top and left in pixels. Default: 0, 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crops_coords_top_left: Option<[i64; 2]>,
    /// Size conditioning: height and width in pixels. Default: the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_size: Option<[i64; 2]>,
    /// Size conditioning of the negative pass. Default: `original_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_original_size: Option<[i64; 2]>,
    /// Crop conditioning of the negative pass. Default: `crops_coords_top_left`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_crops_coords_top_left: Option<[i64; 2]>,
    /// Size conditioning of the negative pass. Default: `target_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_target_size: Option<[i64; 2]>,
    /// A model by name, by path beneath the configured roots, or `owner/name` of the hub. Default: the configured or `demo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Branch, tag or commit of a `model` that is a repository of the hub; results say the commit. Default: `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The autoencoder in place of the model's: a safetensors file, which may hold more, or a folder. Default: the own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// The UNet in place of the model's, likewise. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet: Option<String>,
    /// CLIP ViT-L in place of the model's, likewise. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder: Option<String>,
    /// OpenCLIP ViT-bigG in place of the model's, likewise. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder_2: Option<String>,
    /// Compute dtype. Default: the device's policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// `int8`: the UNet multiplies bytes, faster and in less memory, and the image differs a little. On the CPU only.
    /// Default: the configuration's, `none` as shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// How latents become pixels: `auto`, `whole` or `strips`. The pixels are the same but for rounding. Default: the configuration's, `auto` as
    /// shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<DecodeExtent>,
    /// Whether guidance's passes are made one after another rather than in one batch: in less memory, and the same but for
    /// rounding. Default: the configuration's, as shipped where room is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<bool>,
    /// Which weights leave the device while they are not used: `auto`, `none`, `text_encoders` or `sequential`. The image is
    /// the same. Default: the configuration's, `auto` as shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload: Option<Offload>,
    /// ControlNets and the images that they are shown, at most 8: a list, or an object for one. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controlnet: Option<OneOrMany<ControlNetOptions>>,
    /// T2I-Adapters, up to 8: pictures of edges, depth or the like that the image follows. An object alone is a list of
    /// one. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub t2i_adapter: Option<OneOrMany<T2iAdapterOptions>>,
    /// IP-Adapters, up to 8: images that the image shall be like. An object alone is a list of one. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_adapter: Option<OneOrMany<IpAdapterOptions>>,
    /// LoRA and its relatives, at most 32: a list, or one alone; a string is a file. They are applied in this order, then
    /// those that `prompt` names as `<lora:file:weight>`. Default: none.
    #[serde(alias = "lora", skip_serializing_if = "Option::is_none")]
    pub loras: Option<LoraList>,
    /// Where the image goes, and in which format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputOptions>,
}

impl GenerateRequest {
    /// The request for an image's own metadata: images that it carries as base64 would make the file as large again and
    /// are left out, paths stay.
    #[must_use]
    pub fn without_carried_images(mut self) -> Self {
        let controls = self.controlnet.iter_mut().flat_map(|entries| &mut entries.0).map(|options| &mut options.image);
        for image in [&mut self.init_image, &mut self.mask].into_iter().chain(controls) {
            if matches!(image, Some(ImageSource::Base64(_))) {
                *image = None;
            }
        }
        // What adapters are shown cannot be left out alone: an empty image makes the request fail rather than differ.
        let shown =
            self.t2i_adapter.iter_mut().flat_map(|OneOrMany(entries)| entries).map(|options| &mut options.image);
        let pictures =
            self.ip_adapter.iter_mut().flat_map(|OneOrMany(entries)| entries).flat_map(|options| &mut options.image.0);
        for image in shown.chain(pictures) {
            if let ImageSource::Base64(text) = image {
                text.clear();
            }
        }
        self
    }
}

/// A second model, trained for the last part of denoising.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RefinerOptions {
    /// A model by name or by path, such as SDXL's refiner; any other SDXL model will do.
    pub model: String,
    /// Share of the noise levels, 0 to 1, at which it takes over. Default: 0.8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch_at: Option<f64>,
}

/// What is taken of the distribution that the encoder gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VaeSample {
    #[default]
    Sample,
    Mode,
}

/// Several generations, one after another.
#[derive(Clone, Debug, Default, Deserialize, Serialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct BatchRequest {
    /// 1 to as many generations as the configuration's `max_batch_size`, 64 as shipped. All are checked before the first begins.
    pub requests: Vec<GenerateRequest>,
}
