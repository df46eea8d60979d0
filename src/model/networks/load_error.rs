//! Errors of networks whose weights do not fit.

use candle_core::Error as CandleError;

use crate::error::Error;

/// Converts the error of a load: weights of another network are `model_unsupported`; everything else is the device's.
pub(crate) fn load_error(stage: &'static str) -> impl Fn(CandleError) -> Error {
    move |source| {
        let mut inner = &source;
        while let CandleError::WithBacktrace { inner: next, .. }
        | CandleError::WithPath { inner: next, .. }
        | CandleError::Context { inner: next, .. } = inner
        {
            inner = next;
        }
        match inner {
            CandleError::CannotFindTensor { path } => {
                Error::ModelUnsupported { name: stage.to_owned(), message: format!("it has no tensor `{path}`") }
            }
            CandleError::SafeTensor(reason) => {
                Error::ModelUnsupported { name: stage.to_owned(), message: reason.to_string() }
            }
            CandleError::UnexpectedShape { msg, expected, got } => Error::ModelUnsupported {
                name: stage.to_owned(),
                message: format!("a tensor must be {expected:?}, got {got:?}: {msg}"),
            },
            _ => Error::of_tensors(stage, source),
        }
    }
}
