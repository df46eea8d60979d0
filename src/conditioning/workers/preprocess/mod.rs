//! From a picture to the hint that a ControlNet is shown, by name.
//!
//! Every preprocessor takes a picture that has the hint's size already, so that an edge is one pixel wide in the hint.

pub(crate) mod blur;
pub(crate) mod canny;
pub(crate) mod gaussian;
pub(crate) mod grayscale;
pub(crate) mod invert;
pub(crate) mod lineart;
pub(crate) mod none;
pub(crate) mod scharr;
pub(crate) mod threshold;
pub(crate) mod tile;

use crate::conditioning::interface::PreprocessorParameters;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::layers::Worker;
use crate::registry::Registry;

/// A picture of the wanted size, and what the preprocessor is told.
#[derive(Clone, Copy)]
pub struct HintTask<'a> {
    pub image: &'a Rgb8,
    pub parameters: &'a Parameters,
}

/// A way to make a hint: a picture of the task's size.
pub trait Method: for<'a> Worker<HintTask<'a>, Output = Rgb8> {
    /// The numbers it can be told.
    fn parameters(&self) -> &'static [Parameter] {
        &[]
    }
}

pub type Preprocessor = dyn Method;

pub static PREPROCESSORS: Registry<Preprocessor> = Registry::new(
    "preprocessor",
    &[
        ("none", &none::None),
        ("canny", &canny::Canny),
        ("scharr", &scharr::Scharr),
        ("lineart", &lineart::Lineart),
        ("tile", &tile::Tile),
        ("blur", &blur::Blur),
        ("grayscale", &grayscale::Grayscale),
        ("threshold", &threshold::Threshold),
        ("invert", &invert::Invert),
    ],
);

/// A number that a preprocessor can be told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameter {
    /// A field of [`PreprocessorParameters`].
    pub name: &'static str,
    pub default: f64,
    pub least: f64,
    pub most: f64,
}

/// What a preprocessor is told, decided. Fields that it has no dial for are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parameters {
    pub low_threshold: f64,
    pub high_threshold: f64,
    pub threshold: f64,
    pub sigma: f64,
    pub down_sampling_rate: f64,
}

impl Parameters {
    /// What `options` leaves open is the dial's default. `field` is where the wish stood in the request.
    ///
    /// # Errors
    /// `invalid_parameter` for a value out of range, or one that `name` has no dial for.
    pub fn resolve(
        name: &str,
        parameters: &[Parameter],
        options: &PreprocessorParameters,
        field: &str,
    ) -> Result<Self> {
        let said = options.said();
        if let Some((other, _)) =
            said.iter().find(|(key, value)| value.is_some() && parameters.iter().all(|d| d.name != *key))
        {
            let known: Vec<String> = parameters.iter().map(|parameter| format!("`{}`", parameter.name)).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(Error::InvalidParameter {
                field: format!("{field}.{other}"),
                message: format!("is no parameter of `{name}`"),
                hint: Some(format!("it has {known}")),
            });
        }
        let value = |key: &str| -> Result<f64> {
            let Some(parameter) = parameters.iter().find(|parameter| parameter.name == key) else { return Ok(0.0) };
            let given = said.iter().find(|(known, _)| *known == key).and_then(|(_, value)| *value);
            let value = given.unwrap_or(parameter.default);
            if (parameter.least..=parameter.most).contains(&value) {
                return Ok(value);
            }
            let message = format!("must be {} to {}, got {value}", parameter.least, parameter.most);
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

    /// As a request would say them: those that `parameters` has.
    #[must_use]
    pub fn said(&self, parameters: &[Parameter]) -> PreprocessorParameters {
        let of = |name: &str, value: f64| parameters.iter().any(|parameter| parameter.name == name).then_some(value);
        PreprocessorParameters {
            low_threshold: of("low_threshold", self.low_threshold),
            high_threshold: of("high_threshold", self.high_threshold),
            threshold: of("threshold", self.threshold),
            sigma: of("sigma", self.sigma),
            down_sampling_rate: of("down_sampling_rate", self.down_sampling_rate),
        }
    }
}

/// Where a row or column of `length` pixels continues beyond its ends: mirrored, the border pixel not repeated.
fn mirrored(at: isize, length: usize) -> usize {
    let Some(last) = length.checked_sub(1).filter(|&last| last > 0) else { return 0 };
    let period = 2 * last;
    let place = at.rem_euclid(period.cast_signed()).unsigned_abs();
    if place > last { period - place } else { place }
}
