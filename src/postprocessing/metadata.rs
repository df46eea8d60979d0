//! Generation parameters in image files: AUTOMATIC1111's text, and the full request as JSON.

use std::borrow::Cow;
use std::fmt::Write as _;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// The parameters of one image, as AUTOMATIC1111's web UI writes them.
#[derive(Clone, Debug)]
pub struct Parameters<'a> {
    pub prompt: &'a str,
    pub negative_prompt: &'a str,
    pub steps: usize,
    pub sampler: &'a str,
    /// The noise schedule's name: `Schedule type`.
    pub schedule: &'a str,
    pub cfg_scale: f64,
    pub seed: u64,
    pub width: usize,
    pub height: usize,
    pub model: &'a str,
    /// Further fields in their order, such as `("Denoising strength", "0.6")`.
    pub more: &'a [(&'a str, String)],
}

impl Parameters<'_> {
    /// ```text
    /// a lighthouse
    /// Negative prompt: fog
    /// Steps: 25, Sampler: euler, Schedule type: karras, CFG scale: 5, Seed: 42, Size: 1024x1024, Model: demo
    /// ```
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.prompt.to_owned();
        if !self.negative_prompt.is_empty() {
            text.push_str("\nNegative prompt: ");
            text.push_str(self.negative_prompt);
        }
        // Writing to a `String` does not fail.
        let _ = write!(text, "\nSteps: {}", self.steps);
        let size = format!("{}x{}", self.width, self.height);
        let fixed = [
            ("Sampler", self.sampler.to_owned()),
            ("Schedule type", self.schedule.to_owned()),
            ("CFG scale", self.cfg_scale.to_string()),
            ("Seed", self.seed.to_string()),
            ("Size", size),
            ("Model", self.model.to_owned()),
        ];
        for (key, value) in fixed.iter().chain(self.more) {
            let _ = write!(text, ", {key}: {}", quoted(value));
        }
        text
    }
}

/// Quotes a value with a comma, colon or line break as JSON, so that the line can be split again.
fn quoted(value: &str) -> Cow<'_, str> {
    if value.contains([',', ':', '\n']) { serde_json::Value::from(value).to_string().into() } else { value.into() }
}

/// The texts that are written into an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageText {
    /// For people and other programs: [`Parameters::text`].
    pub parameters: String,
    /// The request that makes the same image again, a JSON object on one line.
    pub request: String,
}

impl ImageText {
    /// `request` serializes to the `data` of a request with every field decided.
    ///
    /// # Errors
    /// `internal` if `request` cannot be written as JSON.
    pub fn new(parameters: &Parameters, request: &impl Serialize) -> Result<Self> {
        let request = serde_json::to_string(request).map_err(|error| Error::bug(format!("image metadata: {error}")))?;
        Ok(Self { parameters: parameters.text(), request })
    }
}

/// A JSON object read from an image, passed on unchanged.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct FoundRequest(Box<RawValue>);

impl FoundRequest {
    /// `None` unless `text` is a JSON object. Line breaks become spaces, because a reply is one line.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let line = text.trim().replace(['\n', '\r'], " ");
        let value = RawValue::from_string(line).ok()?;
        value.get().starts_with('{').then_some(Self(value))
    }

    #[must_use]
    pub fn json(&self) -> &str {
        self.0.get()
    }
}

impl JsonSchema for FoundRequest {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "FoundRequest".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": "object" })
    }
}
