//! The configuration file: one section per domain, and the section `main_interface` for the process itself.

use std::fmt;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::nearest;
use crate::units::Bytes;
use crate::{conditioning, device, inference, model, postprocessing, scheduler};

/// The whole configuration. Every key is optional; an unknown key is an error.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub workers: Workers,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    pub main_interface: MainInterface,
    pub instructors: InstructorSettings,
}

/// The sections of the domains.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstructorSettings {
    pub device: device::interface::Settings,
    pub scheduler: scheduler::interface::Settings,
    pub model: model::interface::Settings,
    pub conditioning: conditioning::interface::Settings,
    pub inference: inference::interface::Settings,
    pub postprocessing: postprocessing::interface::Settings,
}

/// The section `workers.main_interface`: the process and its wire.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MainInterface {
    /// Log level on stderr.
    pub log_level: LogLevel,
    /// Longest accepted line in bytes, as a number or a text such as `32MiB`.
    pub max_line_bytes: Bytes,
    /// Most requests that may wait; one more is answered `queue_full`.
    pub queue_limit: usize,
    /// Treatment of accepted requests when stdin ends.
    pub on_eof: OnEof,
    /// True to emit `ready` once the device is open.
    pub announce: bool,
    /// Milliseconds between `heartbeat` events; 0 for none.
    pub heartbeat_ms: u64,
}

impl Default for MainInterface {
    fn default() -> Self {
        Self {
            log_level: LogLevel::Info,
            max_line_bytes: Bytes(32 * Bytes::MIB),
            queue_limit: 64,
            on_eof: OnEof::Finish,
            announce: false,
            heartbeat_ms: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    #[serde(alias = "OFF")]
    Off,
    #[serde(alias = "ERROR")]
    Error,
    #[serde(alias = "WARN", alias = "warning", alias = "WARNING")]
    Warn,
    #[serde(alias = "INFO")]
    Info,
    #[serde(alias = "DEBUG")]
    Debug,
    #[serde(alias = "TRACE")]
    Trace,
}

impl LogLevel {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnEof {
    /// Finish every accepted request, then exit.
    Finish,
    /// Cancel every accepted request, then exit.
    Cancel,
}

impl Config {
    /// Path of the configuration if none is given.
    pub const PATH: &'static str = "configs/workers_config.json";
    const EMBEDDED: &'static str = include_str!("../../configs/workers_config.json");

    /// Loads the file at `path`; without a path, [`Self::PATH`] in the working directory if it exists, else the copy that
    /// was built in.
    ///
    /// # Errors
    /// A file that cannot be read or is not JSON, an unknown key, an unusable value.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let default = Path::new(Self::PATH);
        let Some(path) = path.or_else(|| default.exists().then_some(default)) else {
            return Self::parse(Self::EMBEDDED, "the built-in configuration");
        };
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, &name),
            Err(error) => {
                Err(ConfigError { file: name, key: None, message: format!("cannot be read: {error}"), hint: None })
            }
        }
    }

    /// Parses `text`; `file` is its name in errors. A byte order mark at the start is skipped.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let text = text.trim_start_matches('\u{feff}');
        if let Ok(value) = serde_json::from_str(text) {
            check_sections(&value, "").map_err(|error| ConfigError { file: file.to_owned(), ..error })?;
        }
        let mut json = serde_json::Deserializer::from_str(text);
        let config: Self = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let key = error.path().to_string();
            ConfigError::from_serde(file, (key != ".").then_some(key), &error.into_inner().to_string())
        })?;
        json.end().map_err(|error| ConfigError::from_serde(file, None, &error.to_string()))?;
        config.check().map_err(|error| ConfigError { file: file.to_owned(), ..error })?;
        Ok(config)
    }

    /// Checks ranges and names, which the types do not. It is called again after flags have overridden keys.
    ///
    /// # Errors
    /// The first key with an unusable value.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, message: String, hint: Option<String>| {
            Err(ConfigError { file: "flags".to_owned(), key: Some(format!("workers.{key}")), message, hint })
        };
        let Workers { main_interface, instructors } = &self.workers;
        let at_least = |key, least: u64, got: u64| {
            if got >= least { Ok(()) } else { wrong(key, format!("must be at least {least}, got {got}"), None) }
        };
        at_least("main_interface.max_line_bytes", 1024, main_interface.max_line_bytes.0)?;
        at_least("main_interface.queue_limit", 1, main_interface.queue_limit as u64)?;
        at_least("instructors.inference.batch_size", 1, instructors.inference.batch_size as u64)?;
        let endpoint = instructors.model.hub.endpoint.as_deref();
        let address = |text: &str| {
            let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
            host.is_some_and(|host| !host.starts_with('/') && !host.is_empty())
                && text.chars().all(|c| c.is_ascii_graphic())
        };
        if endpoint.is_some_and(|text| !address(text)) {
            let message = "must be an address such as `https://huggingface.co`".to_owned();
            return wrong("instructors.model.hub.endpoint", message, None);
        }
        if let Some(name) = &instructors.device.device
            && let Err(error) = name.parse::<device::interface::DeviceRequest>()
        {
            return wrong("instructors.device.device", error.to_string(), error.hint());
        }
        if let Err(error) = postprocessing::instructor::check_settings(&instructors.postprocessing) {
            return wrong("instructors.postprocessing", error.to_string(), error.hint());
        }
        Ok(())
    }
}

/// Checks that every section is an object: serde would accept an array of values in the order of the fields. Sections are
/// the file itself, everything down to `workers.instructors.<domain>`, and `hub` in the section `model`.
fn check_sections(value: &serde_json::Value, key: &str) -> Result<(), ConfigError> {
    if let serde_json::Value::Array(_) = value {
        let key = (!key.is_empty()).then(|| key.to_owned());
        let message = "must be an object, got an array".to_owned();
        return Err(ConfigError { file: String::new(), key, message, hint: None });
    }
    let sections = match key {
        "" => "",
        "workers" | "workers.instructors" => ".",
        "workers.instructors.model" => {
            return value.get("hub").map_or(Ok(()), |hub| check_sections(hub, "workers.instructors.model.hub"));
        }
        _ => return Ok(()),
    };
    value
        .as_object()
        .into_iter()
        .flatten()
        .try_for_each(|(name, value)| check_sections(value, &format!("{key}{sections}{name}")))
}

/// An unusable configuration, for which the process ends with exit code 65.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, or `flags`.
    pub file: String,
    /// The key at fault, such as `workers.instructors.device.auto_detect`; none if no single key is.
    pub key: Option<String>,
    pub message: String,
    pub hint: Option<String>,
}

impl ConfigError {
    /// serde's message names the unknown key and the known ones: ``unknown field `x`, expected one of `a`, `b` ``.
    fn from_serde(file: &str, key: Option<String>, message: &str) -> Self {
        let mut names = message.split('`').skip(1).step_by(2);
        let hint = message.starts_with("unknown ").then(|| nearest(names.next()?, names)).flatten();
        Self {
            file: file.to_owned(),
            key,
            message: message.to_owned(),
            hint: hint.map(|name| format!("did you mean `{name}`?")),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file)?;
        if let Some(key) = &self.key {
            write!(f, "`{key}`: ")?;
        }
        f.write_str(&self.message)?;
        self.hint.iter().try_for_each(|hint| write!(f, " ({hint})"))
    }
}

impl std::error::Error for ConfigError {}
