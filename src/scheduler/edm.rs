//! Noise and preconditioning of Karras et al. 2022 (EDM), <https://arxiv.org/abs/2206.00364>, with which Playground v2.5
//! and CosXL were trained. There are no numbered timesteps: σ alone is the noise level, and the network's time input is
//! c_noise = ¼ ln σ.

use crate::error::{Error, Result};
use crate::scheduler::config::{Prediction, SchedulerConfig};

/// The parameters of an EDM network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edm {
    pub sigma_min: f64,
    pub sigma_max: f64,
    /// Standard deviation of the data.
    pub sigma_data: f64,
}

/// Factors that scale the input and turn a prediction into x₀, for `x = x₀ + σ·ε` (table 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preconditioning {
    pub c_in: f64,
    pub c_skip: f64,
    /// For noise prediction; v-prediction takes the negative.
    pub c_out: f64,
}

/// ρ of equation 5, the same for every released model.
const RHO: f64 = 7.0;

impl Edm {
    /// `None` for a scheduler of another kind. Missing keys take diffusers' defaults.
    ///
    /// # Errors
    /// `model_unsupported` for parameters out of range.
    pub fn from_config(config: &SchedulerConfig) -> Result<Option<Self>> {
        if !config.is_edm() {
            return Ok(None);
        }
        let (min, max) = (config.sigma_min.unwrap_or(0.002), config.sigma_max.unwrap_or(80.0));
        let data = config.sigma_data.unwrap_or(0.5);
        let unusable = |message: String| Error::ModelUnsupported { name: "scheduler_config.json".to_owned(), message };
        if !(min > 0.0 && max > min && max <= 1e6) {
            return Err(unusable(format!(
                "`sigma_min` and `sigma_max` must be positive and grow, got {min} and {max}"
            )));
        }
        if !(data > 0.0 && data <= 1e3) {
            return Err(unusable(format!("`sigma_data` must be above 0 and at most 1000, got {data}")));
        }
        if config.prediction_type == Prediction::Sample {
            return Err(unusable("`prediction_type` must be `epsilon` or `v_prediction`, got `sample`".to_owned()));
        }
        if config.rho.is_some_and(|rho| rho != RHO) {
            return Err(unusable(format!("`rho` must be {RHO}, got {:?}", config.rho)));
        }
        Ok(Some(Self { sigma_min: min, sigma_max: max, sigma_data: data }))
    }

    /// The checkpoint's schedule, `karras` by default.
    ///
    /// # Errors
    /// `model_unsupported` for a schedule other than `karras` and `exponential`.
    pub fn schedule(config: &SchedulerConfig) -> Result<&'static str> {
        match config.sigma_schedule.as_deref().unwrap_or("karras") {
            "karras" => Ok("karras"),
            "exponential" => Ok("exponential"),
            other => Err(Error::ModelUnsupported {
                name: "scheduler_config.json".to_owned(),
                message: format!("`sigma_schedule` must be `karras` or `exponential`, got `{other}`"),
            }),
        }
    }

    /// The network's time input at σ.
    #[must_use]
    pub fn timestep_of(sigma: f64) -> f64 {
        0.25 * sigma.max(1e-10).ln()
    }

    #[must_use]
    pub fn preconditioning(self, sigma: f64) -> Preconditioning {
        let data = self.sigma_data;
        let total = sigma.hypot(data);
        Preconditioning { c_in: 1.0 / total, c_skip: (data / total).powi(2), c_out: sigma * data / total }
    }
}
