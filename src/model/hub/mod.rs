//! Hugging Face's hub: repositories by `owner/name`, the local cache that its tools share, and downloads into it.

pub mod cache;
pub(crate) mod download;
pub(crate) mod fetch;
pub mod reference;
pub(crate) mod sha256;
