//! The noise and the preconditioning of Karras et al. 2022, <https://arxiv.org/abs/2206.00364>, as Playground v2.5 and
//! CosXL were trained with: σ alone says how noisy a sample is, there are no numbered timesteps, and the network is told
//! c_noise = ¼ ln σ.

use crate::error::{Error, Result};
use crate::scheduler::schedule::{Prediction, SchedulerConfig};

/// What a network trained so needs, decided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edm {
    pub sigma_min: f64,
    pub sigma_max: f64,
    /// Standard deviation of the data.
    pub sigma_data: f64,
}

/// How an input is scaled and a prediction becomes x₀, for `x = x₀ + σ·ε` (table 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preconditioning {
    pub c_in: f64,
    pub c_skip: f64,
    /// Of a prediction of the noise; of v it is the negative.
    pub c_out: f64,
}

/// Equation 5 as every such model has it.
const RHO: f64 = 7.0;

impl Edm {
    /// `None` for a scheduler of another kind. What is left out has diffusers' defaults.
    ///
    /// # Errors
    /// `model_unsupported` for numbers that give no noise.
    pub fn of(config: &SchedulerConfig) -> Result<Option<Self>> {
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

    /// The schedule of a checkpoint that says how its σ fall.
    ///
    /// # Errors
    /// `model_unsupported` for one that is neither.
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

    /// What the network is told of σ.
    #[must_use]
    pub fn timestep_of(sigma: f64) -> f64 {
        0.25 * sigma.max(1e-10).ln()
    }

    #[must_use]
    pub fn preconditioning(self, sigma: f64) -> Preconditioning {
        let data = self.sigma_data;
        let whole = sigma.hypot(data);
        Preconditioning { c_in: 1.0 / whole, c_skip: (data / whole).powi(2), c_out: sigma * data / whole }
    }
}
