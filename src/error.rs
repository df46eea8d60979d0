//! The error type. Every variant has a stable code, which is the contract; messages and hints are for people.

use std::path::PathBuf;

use crate::units::Bytes;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error as a client sees it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the line is not valid JSON: {message}")]
    InvalidJson { message: String },
    #[error("the line is not valid UTF-8 at byte {offset}")]
    InvalidUtf8 { offset: usize },
    #[error("the line is longer than {limit} bytes")]
    LineTooLong { limit: usize },
    #[error("{message}")]
    InvalidRequest { message: String, pointer: Option<String>, hint: Option<String> },
    #[error("`{worker_type}` has no operation `{operation}`")]
    UnknownOperation { worker_type: String, operation: String, hint: Option<String> },
    /// A field of `data` with an unusable value. `field` is its name or dotted path below `data`.
    #[error("`{field}` {message}")]
    InvalidParameter { field: String, message: String, hint: Option<String> },
    #[error("unknown {kind} `{name}`")]
    UnknownName { kind: &'static str, name: String, nearest: Option<String>, field: Option<String> },
    #[error("{what} is not supported by this worker")]
    UnsupportedFeature { what: String, hint: Option<String>, field: Option<String> },
    #[error("request id `{request_id}` is already in flight")]
    DuplicateRequestId { request_id: String },
    #[error("the queue already holds {limit} requests")]
    QueueFull { limit: usize },
    #[error("the worker is draining and takes no new work")]
    Draining,
    #[error("the deadline passed")]
    DeadlineExceeded,
    #[error("the request was cancelled")]
    Cancelled,
    #[error("no model `{name}`")]
    ModelNotFound { name: String, hint: Option<String> },
    /// A repository of the hub that is not in the cache and may be downloaded.
    #[error("no model `{name}` in the hub cache")]
    Unfetched {
        name: String,
        /// The error to report if it is not downloaded; set if the cache has parts of it.
        otherwise: Option<Box<Error>>,
    },
    #[error("`{}`: {message}", path.display())]
    ModelCorrupt { path: PathBuf, message: String },
    #[error("`{name}` cannot be used: {message}")]
    ModelUnsupported { name: String, message: String },
    #[error("`{}` is a pickle file, which can run code when it is read", path.display())]
    UnsafeFormat { path: PathBuf },
    #[error("`{}` is outside the configured folders", path.display())]
    PathNotAllowed { path: PathBuf },
    #[error("{what} needs the network, and downloads are off")]
    Offline { what: String },
    #[error("download failed: {message}")]
    DownloadFailed { message: String },
    #[error("the image cannot be decoded: {message}")]
    ImageDecodeFailed { message: String },
    #[error("the image is too large: {message}")]
    ImageTooLarge { message: String },
    /// `needed` and `free` are `None` until somebody who planned the work, or knows the device, fills them in.
    #[error("out of memory in {stage}: {} needed, {} free", needed.unwrap_or_default(), free.unwrap_or_default())]
    OutOfMemory { stage: &'static str, needed: Option<Bytes>, free: Option<Bytes>, fits: Option<String> },
    #[error("device `{device}` is not available: {message}")]
    DeviceUnavailable { device: String, message: String, hint: Option<String> },
    #[error("device `{device}` was lost: {message}")]
    DeviceLost { device: String, message: String },
    #[error("{stage} produced values that are not finite")]
    Numerical { stage: &'static str, hint: Option<String> },
    #[error("the image was blocked by the safety check")]
    SafetyBlocked,
    #[error("`{}` already exists", path.display())]
    OutputExists { path: PathBuf },
    #[error("`{}` cannot be written: {message}", path.display())]
    OutputWriteFailed { path: PathBuf, message: String },
    /// A tensor operation failed; `stage` says in which part of the work.
    #[error("{stage}: {source}")]
    Compute { stage: &'static str, source: candle_core::Error },
    /// A mistake in the worker itself.
    #[error("internal error: {message}")]
    Bug { message: String },
}

impl Error {
    /// Every code, in the order of `src/communication/PROTOCOL.md`.
    pub const CODES: &'static [&'static str] = &[
        "invalid_json",
        "invalid_utf8",
        "line_too_long",
        "invalid_request",
        "unknown_operation",
        "invalid_parameter",
        "unknown_name",
        "unsupported_feature",
        "duplicate_request_id",
        "queue_full",
        "draining",
        "deadline_exceeded",
        "cancelled",
        "model_not_found",
        "model_corrupt",
        "model_unsupported",
        "unsafe_format",
        "path_not_allowed",
        "offline",
        "download_failed",
        "image_decode_failed",
        "image_too_large",
        "out_of_memory",
        "device_unavailable",
        "device_lost",
        "numerical_error",
        "safety_blocked",
        "output_exists",
        "output_write_failed",
        "internal",
    ];

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidJson { .. } => "invalid_json",
            Self::InvalidUtf8 { .. } => "invalid_utf8",
            Self::LineTooLong { .. } => "line_too_long",
            Self::InvalidRequest { .. } => "invalid_request",
            Self::UnknownOperation { .. } => "unknown_operation",
            Self::InvalidParameter { .. } => "invalid_parameter",
            Self::UnknownName { .. } => "unknown_name",
            Self::UnsupportedFeature { .. } => "unsupported_feature",
            Self::DuplicateRequestId { .. } => "duplicate_request_id",
            Self::QueueFull { .. } => "queue_full",
            Self::Draining => "draining",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Cancelled => "cancelled",
            Self::ModelNotFound { .. } | Self::Unfetched { .. } => "model_not_found",
            Self::ModelCorrupt { .. } => "model_corrupt",
            Self::ModelUnsupported { .. } => "model_unsupported",
            Self::UnsafeFormat { .. } => "unsafe_format",
            Self::PathNotAllowed { .. } => "path_not_allowed",
            Self::Offline { .. } => "offline",
            Self::DownloadFailed { .. } => "download_failed",
            Self::ImageDecodeFailed { .. } => "image_decode_failed",
            Self::ImageTooLarge { .. } => "image_too_large",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::DeviceUnavailable { .. } => "device_unavailable",
            Self::DeviceLost { .. } => "device_lost",
            Self::Numerical { .. } => "numerical_error",
            Self::SafetyBlocked => "safety_blocked",
            Self::OutputExists { .. } => "output_exists",
            Self::OutputWriteFailed { .. } => "output_write_failed",
            Self::Compute { .. } | Self::Bug { .. } => "internal",
        }
    }

    /// True if the same request may succeed later.
    #[must_use]
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::QueueFull { .. }
                | Self::Draining
                | Self::DownloadFailed { .. }
                | Self::OutOfMemory { .. }
                | Self::DeviceLost { .. }
                | Self::OutputWriteFailed { .. }
        )
    }

    /// The cure, if one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::InvalidRequest { hint, .. }
            | Self::UnknownOperation { hint, .. }
            | Self::InvalidParameter { hint, .. }
            | Self::UnsupportedFeature { hint, .. }
            | Self::ModelNotFound { hint, .. }
            | Self::DeviceUnavailable { hint, .. }
            | Self::Numerical { hint, .. } => hint.clone(),
            Self::UnknownName { nearest, .. } => nearest.as_ref().map(|n| format!("did you mean `{n}`?")),
            Self::Unfetched { name, .. } => Some(format!("`model.fetch` with `\"model\":\"{name}\"` downloads it")),
            Self::Offline { .. } => {
                Some("set `hub.download` under `workers.instructors.model`, and `model.fetch` downloads it".to_owned())
            }
            Self::UnsafeFormat { .. } => Some("convert it to safetensors".to_owned()),
            Self::OutOfMemory { fits, .. } => fits.clone(),
            _ => None,
        }
    }

    /// JSON pointer to the part of the request line at fault.
    #[must_use]
    pub fn pointer(&self) -> Option<String> {
        match self {
            Self::InvalidRequest { pointer, .. } => pointer.clone(),
            Self::UnknownOperation { .. } => Some("/operation".to_owned()),
            Self::InvalidParameter { field, .. } => Some(format!("/data/{}", field.replace('.', "/"))),
            Self::UnknownName { field: Some(field), .. } | Self::UnsupportedFeature { field: Some(field), .. } => {
                Some(format!("/data/{}", field.replace('.', "/")))
            }
            _ => None,
        }
    }

    /// An unusable value of `data`: ``invalid("width", "must be a multiple of 8, got 1001")``.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidParameter { field: field.into(), message: message.into(), hint: None }
    }

    /// The same error with `field` as the field of `data` at fault.
    #[must_use]
    pub fn at(self, field: &str) -> Self {
        match self {
            Self::UnknownName { kind, name, nearest, .. } => {
                Self::UnknownName { kind, name, nearest, field: Some(field.to_owned()) }
            }
            Self::UnsupportedFeature { what, hint, .. } => {
                Self::UnsupportedFeature { what, hint, field: Some(field.to_owned()) }
            }
            other => other,
        }
    }

    /// The same error with its field below `prefix`.
    #[must_use]
    pub fn below(self, prefix: &str) -> Self {
        match self {
            Self::InvalidParameter { field, message, hint } => {
                Self::InvalidParameter { field: format!("{prefix}.{field}"), message, hint }
            }
            Self::UnknownName { field: Some(ref field), .. }
            | Self::UnsupportedFeature { field: Some(ref field), .. } => {
                let field = format!("{prefix}.{field}");
                self.at(&field)
            }
            other => other,
        }
    }

    /// The error of a failed tensor operation. A device that is out of memory only says so in its text; the caller that
    /// planned the work adds the bytes.
    #[must_use]
    pub fn of_tensors(stage: &'static str, source: candle_core::Error) -> Self {
        let text = source.to_string().to_lowercase();
        if ["out of memory", "out_of_memory", "outofmemory", "alloc_failed"].iter().any(|sign| text.contains(sign)) {
            return Self::OutOfMemory { stage, needed: None, free: None, fits: None };
        }
        Self::Compute { stage, source }
    }

    /// The error to report when no download follows.
    #[must_use]
    pub fn without_download(self) -> Self {
        match self {
            Self::Unfetched { otherwise: Some(error), .. } => *error,
            other => other,
        }
    }

    /// The same error for another request that it ends. Tensor errors cannot be cloned and become `internal`; the errors
    /// that end a lane keep their code.
    #[must_use]
    pub fn for_another_request(&self) -> Self {
        match self {
            Self::DeviceUnavailable { device, message, hint } => {
                Self::DeviceUnavailable { device: device.clone(), message: message.clone(), hint: hint.clone() }
            }
            Self::DeviceLost { device, message } => {
                Self::DeviceLost { device: device.clone(), message: message.clone() }
            }
            other => Self::bug(other.to_string()),
        }
    }

    pub fn bug(message: impl Into<String>) -> Self {
        Self::Bug { message: message.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::of_tensors("compute", source)
    }
}

/// Adds the stage to the error of a tensor operation.
pub trait StageContext<T> {
    fn stage(self, stage: &'static str) -> Result<T>;
}

impl<T> StageContext<T> for candle_core::Result<T> {
    fn stage(self, stage: &'static str) -> Result<T> {
        self.map_err(|source| Error::of_tensors(stage, source))
    }
}

/// Longest name that is compared, in bytes.
const LONGEST_NAME: usize = 64;

/// The name among `known` that is most similar to `name`, if it is similar enough to be a typo of it.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    // The comparison takes quadratic time, and a longer name is no typo.
    if name.len() > LONGEST_NAME {
        return None;
    }
    let lower = name.to_lowercase();
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(likeness, _)| *likeness >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Error, StageContext as _};

    fn check(text: &str, is_memory: bool) {
        let failed: candle_core::Result<()> = Err(candle_core::Error::Msg(text.to_owned()).bt());
        let error = failed.stage("unet").unwrap_err();
        assert_eq!(error.code(), if is_memory { "out_of_memory" } else { "internal" }, "{text}");
        assert!(error.to_string().contains("unet"), "{error}");
        assert_eq!(Error::from(candle_core::Error::Msg(text.to_owned())).code(), error.code(), "{text}");
    }

    #[test]
    fn out_of_memory_is_recognised_by_the_text_of_the_device() {
        check("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", true);
        check("CublasError(CUBLAS_STATUS_ALLOC_FAILED)", true);
        check("kIOGPUCommandBufferCallbackErrorOutOfMemory", true);
        check("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")", false);
        check("shape mismatch in matmul", false);
    }
}
