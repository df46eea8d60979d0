//! Checks of a request's numbers.

use crate::error::{Error, Result};

/// `value`, which must lie within `low..=high`.
///
/// # Errors
/// `invalid_parameter` with `field`.
pub(crate) fn within(field: &str, value: f64, low: f64, high: f64) -> Result<f64> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(field, format!("must be {low} to {high}, got {value}")))
}

/// Refuses the first of `fields` that is given.
///
/// # Errors
/// `invalid_parameter` with the field's name and `message`.
pub(crate) fn refuse_given(fields: &[(&str, bool)], message: &str) -> Result<()> {
    match fields.iter().find(|(_, given)| *given) {
        Some((field, _)) => Err(Error::invalid(*field, message)),
        None => Ok(()),
    }
}
