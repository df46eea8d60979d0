//! An error together with the part of the request line that caused it.

use crate::error::Error;

#[derive(Debug)]
pub struct Fault {
    pub error: Box<Error>,
    /// JSON pointer into the line; replaces the error's own.
    pub pointer: Option<String>,
}

impl Fault {
    pub(crate) fn new(error: Error, pointer: Option<String>) -> Self {
        Self { error: error.into(), pointer }
    }

    /// An `invalid_request` without a hint.
    pub(crate) fn request(message: impl Into<String>, pointer: Option<String>) -> Self {
        Self::new(Error::InvalidRequest { message: message.into(), pointer, hint: None }, None)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::new(error, None)
    }
}
