//! Options of guidance beyond its scale: dynamic thresholding, skipped layers, FreeU. The defaults are those
//! of the projects that the names come from.

use serde::{Deserialize, Serialize};

/// Keeps a high `cfg_scale` from oversaturating the image: scales the guided latents to the extent that they would have at
/// `mimic_scale`, as the extension sd-dynamic-thresholding does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct DynamicThresholdingOptions {
    /// The guidance scale whose extent is the target, 0 to 100. Default: 7.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mimic_scale: Option<f64>,
    /// Share, 0 to 1, of the values that define the guided extent; larger values are clamped. Default: 1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold_percentile: Option<f64>,
    /// Curve of `mimic_scale` over the steps. Default: `constant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mimic_mode: Option<ScaleMode>,
    /// Minimum of the changing `mimic_scale`, 0 to 100. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mimic_scale_min: Option<f64>,
    /// Curve of `cfg_scale` over the steps. Default: `constant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_mode: Option<ScaleMode>,
    /// Minimum of the changing `cfg_scale`, 0 to 100. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_scale_min: Option<f64>,
    /// The exponent of `power_up` and `power_down`, the periods of `linear_repeating`, `cosine_repeating` and `sawtooth`,
    /// 0 to 100. Default: 1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sched_val: Option<f64>,
    /// True gives every latent channel its own extent. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separate_feature_channels: Option<bool>,
    /// Centre of the scaling: `mean` or `zero`. Default: `mean`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling_startpoint: Option<ScalingStartpoint>,
    /// Measure of the extent: `ad`, the greatest distance from the mean, or `std`, the standard deviation. Default: `ad`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variability_measure: Option<VariabilityMeasure>,
    /// Share, 0 to 1, of the thresholded latents in the mix with the guided ones. Default: 1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interpolate_phi: Option<f64>,
}

/// The curve of a scale over the steps.
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

/// Guides the image away from the network's prediction with some transformer blocks skipped, by another evaluation a step,
/// as diffusers' `SkipLayerGuidance` and `LayerSkipConfig` do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct SkipLayerOptions {
    /// Transformer blocks of the UNet by the beginning or any part of their name, such as `mid` or
    /// `down_blocks.2.attentions.0.transformer_blocks.1`. Default: `["mid"]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<String>>,
    /// Scale of the guidance, 0 to 100. Default: 2.8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Share of the steps, 0 to 1, after which it starts. Default: 0.01.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
    /// Share of the steps, 0 to 1, at which it ends. Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<f64>,
    /// True skips self-attention; together with `skip_ff`, the whole block. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_attention: Option<bool>,
    /// True makes every position attend to itself alone, in place of `skip_attention`. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_attention_scores: Option<bool>,
    /// True skips the feed-forward layer. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_ff: Option<bool>,
}

/// FreeU: weights of backbone and skip connections in the UNet's first two up blocks. The names are diffusers', the
/// defaults those published for SDXL.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct FreeUOptions {
    /// Weight of the lowest frequencies of the first block's skip connections, 0 to 10. Default: 0.9.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s1: Option<f64>,
    /// The same in the second block, 0 to 10. Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s2: Option<f64>,
    /// Weight of half the backbone's channels in the first block, 0 to 10. Default: 1.3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b1: Option<f64>,
    /// The same in the second block, 0 to 10. Default: 1.4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b2: Option<f64>,
}
