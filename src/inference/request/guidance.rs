//! What can be asked of guidance beyond a scale: dynamic thresholding, skipped layers, FreeU. The defaults are those
//! of the projects that the names come from.

use serde::{Deserialize, Serialize};

/// Keeps a high `cfg_scale` from burning the image: the guided latents are brought back to the extent that they would have
/// at `mimic_scale`. As the extension sd-dynamic-thresholding has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct DynamicThresholdingOptions {
    /// The guidance whose extent is wanted, 0 to 100. Default: 7.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mimic_scale: Option<f64>,
    /// Share, 0 to 1, of the values that set the guided extent; those above it are cut off. Default: 1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold_percentile: Option<f64>,
    /// How `mimic_scale` changes over the steps. Default: `constant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mimic_mode: Option<ScaleMode>,
    /// What `mimic_scale` goes down to, 0 to 100. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mimic_scale_min: Option<f64>,
    /// How `cfg_scale` changes over the steps. Default: `constant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_mode: Option<ScaleMode>,
    /// What `cfg_scale` goes down to, 0 to 100. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_scale_min: Option<f64>,
    /// The exponent of `power_up` and `power_down`, the periods of `linear_repeating`, `cosine_repeating` and `sawtooth`,
    /// 0 to 100. Default: 1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sched_val: Option<f64>,
    /// Whether every latent channel has its own extent. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separate_feature_channels: Option<bool>,
    /// What the latents are scaled about: `mean` or `zero`. Default: `mean`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling_startpoint: Option<ScalingStartpoint>,
    /// What an extent is: `ad`, the greatest distance from the mean, or `std`, the standard deviation. Default: `ad`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variability_measure: Option<VariabilityMeasure>,
    /// Share, 0 to 1, of the thresholded latents beside the merely guided ones. Default: 1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interpolate_phi: Option<f64>,
}

/// How a scale changes over the steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleMode {
    #[default]
    Constant,
    LinearDown,
    CosineDown,
    HalfCosineDown,
    LinearUp,
    CosineUp,
    HalfCosineUp,
    PowerUp,
    PowerDown,
    LinearRepeating,
    CosineRepeating,
    Sawtooth,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScalingStartpoint {
    #[default]
    Mean,
    Zero,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VariabilityMeasure {
    #[default]
    Ad,
    Std,
}

/// Leads the image away from what the network draws with some transformer blocks skipped, by a further pass. As diffusers'
/// `SkipLayerGuidance` and `LayerSkipConfig`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct SkipLayerOptions {
    /// Transformer blocks of the UNet by the beginning or any part of their name, such as `mid` or
    /// `down_blocks.2.attentions.0.transformer_blocks.1`. Default: `["mid"]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<String>>,
    /// How far to lead away, 0 to 100. Default: 2.8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Share of the steps, 0 to 1, after whose last one it begins. Default: 0.01.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
    /// Share of the steps, 0 to 1, at which it ends. Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<f64>,
    /// Whether self-attention is skipped; with `skip_ff` the whole block is. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_attention: Option<bool>,
    /// Whether every position attends to itself alone, in place of `skip_attention`. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_attention_scores: Option<bool>,
    /// Whether the feed-forward layer is skipped. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_ff: Option<bool>,
}

/// Weighs backbone against skip connections in the first two blocks of the UNet's way up. The names are diffusers', the
/// defaults those published for SDXL.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct FreeUOptions {
    /// Of the lowest frequencies that the first block is handed, 0 to 10. Default: 0.9.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s1: Option<f64>,
    /// Of those that the second block is handed, 0 to 10. Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s2: Option<f64>,
    /// Of half the backbone's channels in the first block, 0 to 10. Default: 1.3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b1: Option<f64>,
    /// Of half the backbone's channels in the second block, 0 to 10. Default: 1.4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b2: Option<f64>,
}
