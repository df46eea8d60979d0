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

/// One generation. Every field but `prompt` is optional; the result's `parameters` have the defaults that were used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields, extend("not" = { "required": ["clip_skip", "CLIP_stop_at_last_layers"] }))]
pub struct GenerateRequest {
    /// Description of the image, in AUTOMATIC1111's syntax. Prompts of more than 75 tokens are encoded in chunks.
    pub prompt: Option<String>,
    /// Prompt of the second text encoder. Default: `prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_2: Option<String>,
    /// Description that the image is guided away from. Default: none, which some checkpoints take as a zero embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// Negative prompt of the second text encoder. Default: `negative_prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt_2: Option<String>,
    /// Denoising steps, 1 to 1000. Default: 25.
    #[serde(alias = "num_inference_steps", skip_serializing_if = "Option::is_none")]
    pub steps: Option<i64>,
    /// Scale of classifier-free guidance, 0 to 100; at 1.0 and less the negative prompt is not evaluated. Default: 5.0.
    #[serde(alias = "guidance_scale", skip_serializing_if = "Option::is_none")]
    pub cfg_scale: Option<f64>,
    /// Guidance towards `init_image`, 1 to 100, for models of the family `sdxl_instruct_pix2pix`. It adds a third evaluation
    /// to each step if `cfg_scale` is above 1. Default: 1.5 for such models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_guidance_scale: Option<f64>,
    /// Share, 0 to 1, by which the guided prediction is rescaled to the conditional one's standard deviation. Default: 0.
    #[serde(alias = "cfg_rescale", skip_serializing_if = "Option::is_none")]
    pub guidance_rescale: Option<f64>,
    /// Shares of the steps, 0 to 1, between which `cfg_scale` applies: from step ⌊start · steps⌋ to before step ⌊end · steps⌋.
    /// The other steps skip the negative prompt and are faster. Default: 0, 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_interval: Option<[f64; 2]>,
    /// Scale of perturbed-attention guidance, 0 to 100, which adds an evaluation to each step. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pag_scale: Option<f64>,
    /// Amount by which `pag_scale` falls with every timestep below 1000, down to 0; 0 to 100. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pag_adaptive_scale: Option<f64>,
    /// Transformer blocks of the UNet whose attention is perturbed, by any part of their names, such as `mid`, `up_blocks.0`
    /// or `down_blocks.1.attentions.0`. Default: `["mid"]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pag_applied_layers: Option<Vec<String>>,
    /// Guidance away from a network with layers skipped. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_layer: Option<SkipLayerOptions>,
    /// Dynamic thresholding, for `cfg_scale` above 1. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dynamic_thresholding: Option<DynamicThresholdingOptions>,
    /// FreeU: weights of the UNet's backbone and skip connections. Default: none.
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
    /// Custom schedule of falling σ, the last one 0, in place of `steps` and `scheduler`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigmas: Option<Vec<f64>>,
    /// Custom schedule of falling timesteps, 999 to 0, in place of `steps` and `scheduler`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timesteps: Option<Vec<f64>>,
    /// Meaning of the network's output. Default: the checkpoint's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction_type: Option<Prediction>,
    /// True rescales the training schedule to end at pure noise. Default: the checkpoint's own.
    #[serde(alias = "rescale_betas_zero_snr", skip_serializing_if = "Option::is_none")]
    pub zero_terminal_snr: Option<bool>,
    /// Seed of the first image, 0 to 2⁶³-1; each later image adds 1. Default, and for -1: random below 2³².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Variation seed of the first image, 0 to 2⁶³-1; each later image adds 1. Default, and for -1: random below 2³².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subseed: Option<i64>,
    /// Share, 0 to 1, by which the initial noise is interpolated towards the noise of `subseed`. Above 0 all images have
    /// `seed` and differ by `subseed`. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subseed_strength: Option<f64>,
    /// Random generator: torch's on the CPU (`cpu`), or CUDA's (`nv`). Default: `cpu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngKind>,
    /// Width in pixels, a multiple of 8. Default: the UNet's `sample_size` × 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// Height in pixels, a multiple of 8. Default: the UNet's `sample_size` × 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub height: Option<i64>,
    /// Image to start from. `width` and `height` default to its size, rounded down to multiples of 8.
    #[serde(alias = "image", skip_serializing_if = "Option::is_none")]
    pub init_image: Option<ImageSource>,
    /// Share of the steps that denoise `init_image`, 0 to 1: int(steps · strength) steps are taken. With `enable_hr`, the
    /// share of the second pass. Default: 0.75.
    #[serde(alias = "strength", skip_serializing_if = "Option::is_none")]
    pub denoising_strength: Option<f64>,
    /// Resizing of an image of other proportions: `stretch`, `crop` or `fill`. Default: `stretch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_mode: Option<ResizeMode>,
    /// Latents of `init_image`: sampled with the request's noise (`sample`), or the most likely ones (`mode`). Default:
    /// `sample`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_sample: Option<VaeSample>,
    /// Mask of `init_image`, resized to it: white is repainted.
    #[serde(alias = "mask_image", skip_serializing_if = "Option::is_none")]
    pub mask: Option<ImageSource>,
    /// Standard deviation of the mask's blur in pixels, 0 to 256. Default: 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_blur: Option<f64>,
    /// True repaints black instead. Default: false.
    #[serde(alias = "inpainting_mask_invert", skip_serializing_if = "Option::is_none")]
    pub mask_invert: Option<bool>,
    /// True blends grey values in every step; otherwise values of half and more are masked. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft_mask: Option<bool>,
    /// Initial content of the masked part: `original`, `fill`, `noise` or `zeros`. Default: `original`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inpainting_fill: Option<InpaintingFill>,
    /// True generates the masked part alone, at `width` × `height`, and pastes it back. Default: false.
    #[serde(alias = "only_masked", skip_serializing_if = "Option::is_none")]
    pub inpaint_full_res: Option<bool>,
    /// Pixels around the masked part, 0 to 4096, with `inpaint_full_res`. Default: 32.
    #[serde(alias = "padding_mask_crop", skip_serializing_if = "Option::is_none")]
    pub inpaint_full_res_padding: Option<i64>,
    /// True restores the original's bytes where nothing is masked. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paste_back: Option<bool>,
    /// Pixels by which `init_image` grows on each side; the margins are repainted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extend: Option<Margins>,
    /// Share of the noise levels, 0 to 1, that are denoised already; no noise is added. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denoising_start: Option<f64>,
    /// Share of the noise levels, 0 to 1, at which denoising stops. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denoising_end: Option<f64>,
    /// A second model for the last steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refiner: Option<RefinerOptions>,
    /// True adds a second pass at a larger size. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_hr: Option<bool>,
    /// Factor between the sizes of the passes, 1 to 8; sizes are rounded down to multiples of 8. Default: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_scale: Option<f64>,
    /// Width of the second pass in pixels, a multiple of 8, in place of `hr_scale`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_resize_x: Option<i64>,
    /// Height of the second pass in pixels, a multiple of 8, in place of `hr_scale`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_resize_y: Option<i64>,
    /// Upscaler between the passes: `latent`, `latent_bicubic`, `latent_nearest`, `lanczos` or `bicubic`. Default: `latent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_upscaler: Option<String>,
    /// Steps of the second pass, before `denoising_strength` reduces them; 0 means `steps`. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hr_second_pass_steps: Option<i64>,
    /// The refiner's aesthetic score of the prompt, 0 to 10. Default: 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aesthetic_score: Option<f64>,
    /// The refiner's aesthetic score of the negative prompt, 0 to 10. Default: 2.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_aesthetic_score: Option<f64>,
    /// Images in each of the `n_iter` batches. Default: the configuration's `batch_size`.
    #[serde(alias = "num_images_per_prompt", skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<i64>,
    /// Number of batches: `n_iter` · `batch_size` images, numbered consecutively, at most 64 as shipped. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_iter: Option<i64>,
    /// Layers of the text encoders left out before the penultimate one, counted as diffusers does: 0, the default, is the
    /// penultimate layer. 0 to 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<i64>,
    /// The same as `clip_skip`, counted from 1 as AUTOMATIC1111 does: 2 is the penultimate layer, which is `clip_skip` 0. 2 to
    /// 66.
    #[serde(rename = "CLIP_stop_at_last_layers", skip_serializing_if = "Option::is_none")]
    pub clip_stop_at_last_layers: Option<i64>,
    /// Weighting of words: `a1111`, `compel` or `comfy`; with `none` prompts are plain text. Default: `a1111`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_weighting: Option<PromptWeighting>,
    /// Tokens, 0 to 74: a full chunk of 75 tokens ends at a comma that is at most that many tokens back. Default: 0.
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
    /// A model by name, by path below the configured roots, or `owner/name` of the hub. Default: the configured model, or
    /// `demo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Branch, tag or commit of a `model` from the hub; results have the commit. Default: `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// VAE in place of the model's: a safetensors file, which may hold more, or a folder. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// UNet in place of the model's, named in the same way. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet: Option<String>,
    /// CLIP ViT-L in place of the model's, named in the same way. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder: Option<String>,
    /// OpenCLIP ViT-bigG in place of the model's, named in the same way. Default: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder_2: Option<String>,
    /// Compute dtype. Default: the device's policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// With `int8` the UNet multiplies bytes, which is faster, needs less memory, and changes the image a little; on the CPU
    /// only. Default: the configuration's, `none` as shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Decoding of latents: `auto`, `whole` or `strips`. The pixels are the same up to rounding. Default: the
    /// configuration's, `auto` as shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<DecodeExtent>,
    /// True evaluates guidance one pass after another rather than in one batch, which needs less memory and is the same up to
    /// rounding. Default: the configuration's, as shipped only if memory is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<bool>,
    /// Weights that are offloaded while they are not used: `auto`, `none`, `text_encoders` or `sequential`. The image is the
    /// same. Default: the configuration's, `auto` as shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload: Option<Offload>,
    /// ControlNets and their images, at most 8: a list, or an object for one. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controlnet: Option<OneOrMany<ControlNetOptions>>,
    /// T2I-Adapters and their images of edges, depth or the like, at most 8: a list, or an object for one. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub t2i_adapter: Option<OneOrMany<T2iAdapterOptions>>,
    /// IP-Adapters and the images that the result resembles, at most 8: a list, or an object for one. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_adapter: Option<OneOrMany<IpAdapterOptions>>,
    /// LoRAs and related adapters, at most 32: a list, or a single one; a string is a file. They are applied in this order,
    /// then those that `prompt` names as `<lora:file:weight>`. Default: none.
    #[serde(alias = "lora", skip_serializing_if = "Option::is_none")]
    pub loras: Option<LoraList>,
    /// Destination and format of the images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputOptions>,
}

impl GenerateRequest {
    /// The request for an image's own metadata, without the images that it carries as base64, which would enlarge the file;
    /// paths stay.
    #[must_use]
    pub fn without_carried_images(mut self) -> Self {
        let controls = self.controlnet.iter_mut().flat_map(|entries| &mut entries.0).map(|options| &mut options.image);
        for image in [&mut self.init_image, &mut self.mask].into_iter().chain(controls) {
            if matches!(image, Some(ImageSource::Base64(_))) {
                *image = None;
            }
        }
        // An adapter without its image would change the result: an empty image makes the request fail instead.
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

/// A second model for the last steps of denoising.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RefinerOptions {
    /// A model by name or by path, such as SDXL's refiner or any other SDXL model.
    pub model: String,
    /// Share of the noise levels, 0 to 1, at which it takes over. Default: 0.8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch_at: Option<f64>,
}

/// Latents taken from the distribution that the VAE encodes an image to.
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
    /// 1 to `max_batch_size` generations, 64 as shipped. All are checked before the first one starts.
    pub requests: Vec<GenerateRequest>,
}
