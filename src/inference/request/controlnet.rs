//! ControlNets of a request: the field `controlnet`.

use serde::{Deserialize, Serialize};

use crate::conditioning::init_image::ResizeMode;
use crate::conditioning::interface::PreprocessorParameters;
use crate::image::source::ImageSource;

/// Largest number of ControlNets in one request.
pub const MAX_CONTROLNETS: usize = 8;

/// A ControlNet and the image that it follows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, expecting = "an array of objects, or one object")]
#[schemars(deny_unknown_fields)]
pub struct ControlNetOptions {
    /// A ControlNet, a ControlNet Union or a Control-LoRA: a safetensors file, with or without its extension, or a folder in
    /// diffusers' layout, below the configured model roots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The network's image, which is resized to the generated image.
    #[serde(alias = "input_image", skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSource>,
    /// Preprocessor that turns the image into the hint, by a name of `conditioning.list`. Default: `none`, the image is the
    /// hint.
    #[serde(alias = "module", skip_serializing_if = "Option::is_none")]
    pub preprocessor: Option<String>,
    /// Parameters of the preprocessor. `conditioning.list` has their names, ranges and defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<PreprocessorParameters>,
    /// Multiplier of its residuals, 0 to 2. Default: 1.
    #[serde(alias = "conditioning_scale", skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of the steps, 0 to 1, from which it applies. Default: 0.
    #[serde(alias = "guidance_start", skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
    /// Share of the steps, 0 to 1 and above `start`, up to which it applies. Default: 1.
    #[serde(alias = "guidance_end", skip_serializing_if = "Option::is_none")]
    pub end: Option<f64>,
    /// True applies it to the prompt but not to the negative prompt, and to deep feature maps more than to shallow ones, so
    /// that the image is followed without a prompt. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guess_mode: Option<bool>,
    /// The image's type, for a ControlNet Union: `openpose`, `depth`, `hed`, `pidi`, `scribble`, `ted`, `canny`,
    /// `lineart`, `anime_lineart`, `mlsd`, `normal`, `segment`, `tile` or `repaint`. A union takes all
    /// of its images at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_type: Option<String>,
    /// Resizing of an image of other proportions: `stretch`, `crop` or `fill`. Default: `stretch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_mode: Option<ResizeMode>,
}
