//! What can be asked of guidance beyond a scale: dynamic thresholding, skipped layers, FreeU. The defaults are those of
//! the projects that the names come from.

use serde::{Deserialize, Serialize};

/// Keeps a high `cfg_scale` from burning the image: the guided latents are brought back to the extent that they would have
/// at `mimic_scale`. As the extension sd-dynamic-thresholding has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct DynamicThresholding {
    /// The guidance whose extent is wanted, 0 to 100. Default: 7.0.
    pub mimic_scale: f64,
    /// Share, 0 to 1, of the values that set the guided extent; those above it are cut off. Default: 1.0.
    pub threshold_percentile: f64,
    /// How `mimic_scale` changes over the steps. Default: `constant`.
    pub mimic_mode: ScaleMode,
    /// What `mimic_scale` goes down to, 0 to 100. Default: 0.
    pub mimic_scale_min: f64,
    /// How `cfg_scale` changes over the steps. Default: `constant`.
    pub cfg_mode: ScaleMode,
    /// What `cfg_scale` goes down to, 0 to 100. Default: 0.
    pub cfg_scale_min: f64,
    /// The exponent of `power_up` and `power_down`, the periods of `linear_repeating`, `cosine_repeating` and `sawtooth`,
    /// 0 to 100. Default: 1.0.
    pub sched_val: f64,
    /// Whether every latent channel has its own extent. Default: true.
    pub separate_feature_channels: bool,
    /// What the latents are scaled about: `mean` or `zero`. Default: `mean`.
    pub scaling_startpoint: ScalingStartpoint,
    /// What an extent is: `ad`, the greatest distance from the mean, or `std`, the standard deviation. Default: `ad`.
    pub variability_measure: VariabilityMeasure,
    /// Share, 0 to 1, of the thresholded latents beside the merely guided ones. Default: 1.0.
    pub interpolate_phi: f64,
}

impl Default for DynamicThresholding {
    fn default() -> Self {
        Self {
            mimic_scale: 7.0,
            threshold_percentile: 1.0,
            mimic_mode: ScaleMode::Constant,
            mimic_scale_min: 0.0,
            cfg_mode: ScaleMode::Constant,
            cfg_scale_min: 0.0,
            sched_val: 1.0,
            separate_feature_channels: true,
            scaling_startpoint: ScalingStartpoint::Mean,
            variability_measure: VariabilityMeasure::Ad,
            interpolate_phi: 1.0,
        }
    }
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct SkipLayer {
    /// Transformer blocks of the UNet by the beginning or any part of their name, such as `mid` or
    /// `down_blocks.2.attentions.0.transformer_blocks.1`. Default: `["mid"]`.
    pub layers: Vec<String>,
    /// How far to lead away, 0 to 100. Default: 2.8.
    pub scale: f64,
    /// Share of the steps, 0 to 1, after whose last one it begins. Default: 0.01.
    pub start: f64,
    /// Share of the steps, 0 to 1, at which it ends. Default: 0.2.
    pub stop: f64,
    /// Whether self-attention is skipped; with `skip_ff` the whole block is. Default: true.
    pub skip_attention: bool,
    /// Whether every position attends to itself alone, in place of `skip_attention`. Default: false.
    pub skip_attention_scores: bool,
    /// Whether the feed-forward layer is skipped. Default: true.
    pub skip_ff: bool,
}

impl Default for SkipLayer {
    fn default() -> Self {
        Self {
            layers: vec!["mid".to_owned()],
            scale: 2.8,
            start: 0.01,
            stop: 0.2,
            skip_attention: true,
            skip_attention_scores: false,
            skip_ff: true,
        }
    }
}

/// Weighs backbone against skip connections in the first two blocks of the UNet's way up. The names are diffusers', the
/// defaults those published for SDXL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct FreeUWish {
    /// Of the lowest frequencies that the first block is handed, 0 to 10. Default: 0.9.
    pub s1: f64,
    /// Of those that the second block is handed, 0 to 10. Default: 0.2.
    pub s2: f64,
    /// Of half the backbone's channels in the first block, 0 to 10. Default: 1.3.
    pub b1: f64,
    /// Of half the backbone's channels in the second block, 0 to 10. Default: 1.4.
    pub b2: f64,
}

impl Default for FreeUWish {
    fn default() -> Self {
        Self { s1: 0.9, s2: 0.2, b1: 1.3, b2: 1.4 }
    }
}
