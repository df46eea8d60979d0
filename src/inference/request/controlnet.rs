//! What a request says of ControlNets: which network is shown which image, how strongly and when.

use serde::{Deserialize, Serialize};

use crate::conditioning::init_image::ResizeMode;
use crate::conditioning::interface::PreprocessorParameters;
use crate::image::source::ImageSource;

/// Largest number of ControlNets in one request.
pub const MAX_CONTROLNETS: usize = 8;

/// One image that steers a generation, and the ControlNet that is shown it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, expecting = "an array of objects, or one object")]
#[schemars(deny_unknown_fields)]
pub struct ControlNetOptions {
    /// A ControlNet, a ControlNet Union or a Control-LoRA: a safetensors file, with its ending or without, or a folder in
    /// diffusers' layout, beneath the configured model roots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What the network is shown. It is brought to the size of the generated image.
    #[serde(alias = "input_image", skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSource>,
    /// What makes the hint of the image, a name that `conditioning.list` gives. Default: `none`, the image is the hint.
    #[serde(alias = "module", skip_serializing_if = "Option::is_none")]
    pub preprocessor: Option<String>,
    /// Numbers for the preprocessor. `conditioning.list` says which there are, with range and default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<PreprocessorParameters>,
    /// How strongly it steers, 0 to 2. Default: 1.
    #[serde(alias = "conditioning_scale", skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of the steps, 0 to 1, before which it does nothing. Default: 0.
    #[serde(alias = "guidance_start", skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
    /// Share of the steps, 0 to 1 and above `start`, after which it does nothing. Default: 1.
    #[serde(alias = "guidance_end", skip_serializing_if = "Option::is_none")]
    pub end: Option<f64>,
    /// Whether it steers the pass for the prompt alone, and the coarse more than the fine, so that the image is followed
    /// without a prompt. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guess_mode: Option<bool>,
    /// For a ControlNet Union, what the image is: `openpose`, `depth`, `hed`, `pidi`, `scribble`, `ted`, `canny`,
    /// `lineart`, `anime_lineart`, `mlsd`, `normal`, `segment`, `tile` or `repaint`. Images of one request for one union
    /// are shown to it at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_type: Option<String>,
    /// How an image of other proportions is brought to the size: `stretch`, `crop` or `fill`. Default: `stretch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_mode: Option<ResizeMode>,
}
