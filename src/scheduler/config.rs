//! Parameters of the noise that a checkpoint was trained on, as its `scheduler_config.json` states them.

use serde::{Deserialize, Serialize};

/// The quantity that the network predicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise ε.
    #[default]
    Epsilon,
    /// v = α·ε − σ·x₀ (Salimans & Ho 2022).
    #[serde(alias = "v")]
    VPrediction,
    /// x₀ itself.
    Sample,
}

/// How β grows over the training timesteps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    #[default]
    Linear,
    /// Linear in √β.
    ScaledLinear,
    /// ᾱ is a squared cosine, β at most 0.999 (Nichol & Dhariwal 2021).
    SquaredcosCapV2,
}

/// The timestep spacing that a checkpoint names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    Leading,
    Trailing,
    Linspace,
}

impl TimestepSpacing {
    /// Its name in `SPACINGS`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Leading => "leading",
            Self::Trailing => "trailing",
            Self::Linspace => "linspace",
        }
    }
}

/// The σ at which a run ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigmas {
    #[default]
    Zero,
    SigmaMin,
}

/// A checkpoint's `scheduler_config.json`. Missing keys take diffusers' defaults; unknown keys are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// diffusers' class, which names the checkpoint's own sampler.
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    pub trained_betas: Option<Vec<f64>>,
    pub prediction_type: Prediction,
    pub timestep_spacing: Option<TimestepSpacing>,
    pub steps_offset: usize,
    pub rescale_betas_zero_snr: Option<bool>,
    pub set_alpha_to_one: Option<bool>,
    pub use_karras_sigmas: Option<bool>,
    pub use_exponential_sigmas: Option<bool>,
    pub use_beta_sigmas: Option<bool>,
    pub final_sigmas_type: FinalSigmas,
    /// `dpmsolver++` or `sde-dpmsolver++`, for classes that implement both.
    pub algorithm_type: Option<String>,
    pub original_inference_steps: usize,
    /// Lowest and highest σ, standard deviation of the data, and the schedule of σ of a model trained with EDM noise.
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
    pub sigma_data: Option<f64>,
    pub sigma_schedule: Option<String>,
    pub rho: Option<f64>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class_name: None,
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            prediction_type: Prediction::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            rescale_betas_zero_snr: None,
            set_alpha_to_one: None,
            use_karras_sigmas: None,
            use_exponential_sigmas: None,
            use_beta_sigmas: None,
            final_sigmas_type: FinalSigmas::Zero,
            algorithm_type: None,
            original_inference_steps: 50,
            sigma_min: None,
            sigma_max: None,
            sigma_data: None,
            sigma_schedule: None,
            rho: None,
        }
    }
}

impl SchedulerConfig {
    /// True if the network was trained with the noise and preconditioning of Karras et al. 2022 (EDM),
    /// <https://arxiv.org/abs/2206.00364>.
    #[must_use]
    pub fn is_edm(&self) -> bool {
        self.class_name.as_deref().is_some_and(|class| class.starts_with("EDM"))
    }

    /// The scheduler of SDXL base 1.0, for checkpoints without one.
    #[must_use]
    pub fn sdxl() -> Self {
        Self {
            class_name: Some("EulerDiscreteScheduler".to_owned()),
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            timestep_spacing: Some(TimestepSpacing::Leading),
            steps_offset: 1,
            set_alpha_to_one: Some(false),
            ..Self::default()
        }
    }
}
