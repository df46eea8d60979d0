//! The contract of a ControlNet preprocessor, and its parameters.
//!
//! A preprocessor is one file in `workers/preprocess/` and one line in [`crate::conditioning::PREPROCESSORS`].

use crate::conditioning::interface::PreprocessorParameters;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::layers::Worker;

/// Makes the hint that a ControlNet is trained on. The image already has the hint's size, so that an edge is one pixel
/// wide in the hint; the result has the same size.
pub trait Preprocessor: for<'a> Worker<PreprocessTask<'a>, Output = Rgb8> {
    fn parameters(&self) -> &'static [ParameterSpec] {
        &[]
    }
}

#[derive(Clone, Copy)]
pub struct PreprocessTask<'a> {
    pub image: &'a Rgb8,
    pub parameters: &'a ParameterValues,
}

/// A numeric parameter of a preprocessor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParameterSpec {
    /// A field of [`PreprocessorParameters`].
    pub name: &'static str,
    pub default: f64,
    pub min: f64,
    pub max: f64,
}

/// The parameters of a preprocessor, decided. Fields that it does not have are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ParameterValues {
    pub low_threshold: f64,
    pub high_threshold: f64,
    pub threshold: f64,
    pub sigma: f64,
    pub down_sampling_rate: f64,
}

impl ParameterValues {
    /// Takes the default for what `requested` leaves out. `field` is the request's field, for errors.
    ///
    /// # Errors
    /// `invalid_parameter` for a value out of range, or one that preprocessor `name` does not have.
    pub fn resolve(
        name: &str,
        specs: &[ParameterSpec],
        requested: &PreprocessorParameters,
        field: &str,
    ) -> Result<Self> {
        let requested = requested.by_name();
        let unknown = |key: &str| specs.iter().all(|spec| spec.name != key);
        if let Some((key, _)) = requested.iter().find(|(key, value)| value.is_some() && unknown(key)) {
            let names: Vec<String> = specs.iter().map(|spec| format!("`{}`", spec.name)).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(Error::InvalidParameter {
                field: format!("{field}.{key}"),
                message: format!("is no parameter of `{name}`"),
                hint: Some(format!("it has {names}")),
            });
        }
        let value = |key: &str| -> Result<f64> {
            let Some(spec) = specs.iter().find(|spec| spec.name == key) else { return Ok(0.0) };
            let given = requested.iter().find(|(known, _)| *known == key).and_then(|(_, value)| *value);
            let value = given.unwrap_or(spec.default);
            if (spec.min..=spec.max).contains(&value) {
                return Ok(value);
            }
            let message = format!("must be {} to {}, got {value}", spec.min, spec.max);
            Err(Error::invalid(format!("{field}.{key}"), message))
        };
        Ok(Self {
            low_threshold: value("low_threshold")?,
            high_threshold: value("high_threshold")?,
            threshold: value("threshold")?,
            sigma: value("sigma")?,
            down_sampling_rate: value("down_sampling_rate")?,
        })
    }

    /// The request for the same values; fields without a spec are left out.
    #[must_use]
    pub fn echo(&self, specs: &[ParameterSpec]) -> PreprocessorParameters {
        let known = |name: &str, value: f64| specs.iter().any(|spec| spec.name == name).then_some(value);
        PreprocessorParameters {
            low_threshold: known("low_threshold", self.low_threshold),
            high_threshold: known("high_threshold", self.high_threshold),
            threshold: known("threshold", self.threshold),
            sigma: known("sigma", self.sigma),
            down_sampling_rate: known("down_sampling_rate", self.down_sampling_rate),
        }
    }
}
