//! How long work took on this machine: measured while it is done, read by estimates.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a measurement is of. Time is taken to grow with `units`, which holds well enough between image sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// Unit: one latent position of one sample through the UNet once.
    Evaluation,
    /// Unit: one latent position through the VAE's decoder.
    Decode,
}

/// Shared by the compute thread, which writes, and the desk thread, which answers estimates.
#[derive(Debug, Default)]
pub struct Throughput {
    seconds_per_unit: Mutex<HashMap<(String, Work), f64>>,
}

impl Throughput {
    /// Models remembered; a pool that goes through more starts over.
    const LIMIT: usize = 256;

    /// Remembers the latest measurement of `work` with the model and dtype named by `key`.
    pub fn record(&self, key: &str, work: Work, units: usize, took: Duration) {
        if units == 0 {
            return;
        }
        let mut table = self.seconds_per_unit.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= Self::LIMIT {
            table.clear();
        }
        table.insert((key.to_owned(), work), took.as_secs_f64() / units as f64);
    }

    /// Seconds that `units` of `work` will take, if any was ever measured.
    #[must_use]
    pub fn expect(&self, key: &str, work: Work, units: usize) -> Option<f64> {
        let table = self.seconds_per_unit.lock().unwrap_or_else(PoisonError::into_inner);
        table.get(&(key.to_owned(), work)).map(|seconds| seconds * units as f64)
    }
}
