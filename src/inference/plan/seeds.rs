//! Seeds of a request's images.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

use crate::error::{Error, Result};
use crate::inference::interface::Settings;
use crate::inference::plan::limits::within;
use crate::inference::request::generate::GenerateRequest;
use crate::noise::{Seed, Variation};

/// One seed an image. AUTOMATIC1111's rule: without a variation the seeds count up, with one all images share the seed
/// and the variations count up (modules/processing.py).
///
/// # Errors
/// `invalid_parameter` for counts and seeds out of range.
pub(crate) fn seeds(request: &GenerateRequest, settings: &Settings) -> Result<Vec<Seed>> {
    let count = images(request, settings)?;
    let strength = within("subseed_strength", request.subseed_strength.unwrap_or(0.0), 0.0, 1.0)?;
    if request.subseed_strength.is_none() && request.subseed.is_some_and(|subseed| subseed >= 0) {
        return Err(Error::invalid("subseed", "needs `subseed_strength`, which is 0 where it is left out"));
    }
    if strength == 0.0 {
        let alone = |main: u64| Seed { main, variation: None };
        return Ok(consecutive("seed", request.seed, count)?.map(alone).collect());
    }
    let Range { start: main, .. } = consecutive("seed", request.seed, 1)?;
    let varied = |seed: u64| Seed { main, variation: Some(Variation { seed, strength }) };
    Ok(consecutive("subseed", request.subseed, count)?.map(varied).collect())
}

/// Images of the request.
fn images(request: &GenerateRequest, settings: &Settings) -> Result<u64> {
    let limit = i64::from(settings.max_batch_size);
    let batch = request.batch_size.unwrap_or(i64::from(settings.batch_size));
    let batches = request.n_iter.unwrap_or(1);
    for (field, count) in [("batch_size", batch), ("n_iter", batches)] {
        if !(1..=limit).contains(&count) {
            return Err(Error::invalid(field, format!("must be 1 to {limit}, got {count}")));
        }
    }
    let count = batch.saturating_mul(batches);
    if count > limit {
        let message = format!("must leave at most {limit} images, got {batches} batches of {batch}");
        return Err(Error::invalid("n_iter", message));
    }
    Ok(count.unsigned_abs())
}

/// `count` seeds from `first` on, which is random if it is left out or -1.
fn consecutive(field: &str, first: Option<i64>, count: u64) -> Result<Range<u64>> {
    let first = match first {
        None | Some(-1) => RandomState::new().build_hasher().finish() & 0xffff_ffff,
        Some(seed) => {
            u64::try_from(seed).map_err(|_| Error::invalid(field, format!("must be -1 or 0 to 2⁶³-1, got {seed}")))?
        }
    };
    let end = first + count;
    if i64::try_from(end - 1).is_err() {
        let message = format!("must leave room for {count} images below 2⁶³, got {first}");
        return Err(Error::invalid(field, message));
    }
    Ok(first..end)
}
