//! Hashes that a request pins files to.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::model::hub::fetch::select::is_weights;
use crate::model::interface::Pins;

/// The pinned hashes of the chosen files, in lower case.
///
/// # Errors
/// `invalid_parameter` for a value that is not a SHA-256, or for a file that was not chosen.
pub(crate) fn pinned(pins: Option<&Pins>, chosen: &[String]) -> Result<Vec<(String, String)>> {
    let hash = |field: &str, text: &str| {
        let hash = text.trim().trim_start_matches("sha256:").to_lowercase();
        match hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            true => Ok(hash),
            false => Err(Error::invalid(field, "must be a SHA-256 of 64 hexadecimal digits")),
        }
    };
    match pins {
        None => Ok(Vec::new()),
        Some(Pins::One(text)) => {
            let weights: Vec<&String> = chosen.iter().filter(|name| is_weights(name)).collect();
            let only = match (chosen, weights.as_slice()) {
                ([only], _) => Some(only),
                (_, [only]) => Some(*only),
                _ => None,
            };
            match only {
                Some(only) => Ok(vec![(only.clone(), hash("sha256", text)?)]),
                None => {
                    let message = "must be an object of hashes by file where several files of weights are meant";
                    Err(Error::invalid("sha256", message))
                }
            }
        }
        Some(Pins::Each(hashes)) => {
            let one = |(name, text): (&String, &String)| match chosen.contains(name) {
                true => Ok((name.clone(), hash("sha256", text)?)),
                false => Err(Error::invalid("sha256", format!("names `{name}`, which is not among the files"))),
            };
            hashes.iter().map(one).collect()
        }
    }
}

/// The error for a file with another hash.
pub(crate) fn mismatch(name: &str, hash: &str, pin: &str) -> Error {
    let message = format!("has the SHA-256 {hash}, and the request pins {pin}");
    Error::ModelCorrupt { path: PathBuf::from(name), message }
}
