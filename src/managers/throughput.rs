//! Throughput of this machine: measured during work, read by estimates.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::device::interface::{Dtype, Quantization};
use crate::model::checkpoint::CheckpointKey;

/// A kind of work. Its time is assumed to grow with its units, which holds well enough between image sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// Unit: one latent position of one sample through the UNet once.
    Evaluation,
    /// Unit: one latent position through the VAE's decoder.
    Decode,
}

/// The model, and the arithmetic it runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ThroughputKey {
    pub model: CheckpointKey,
    pub dtype: Dtype,
    pub quantization: Quantization,
}

/// Shared by the compute thread, which records, and the query thread, which answers estimates.
#[derive(Debug, Default)]
pub struct Throughput {
    seconds_per_unit: Mutex<HashMap<(ThroughputKey, Work), f64>>,
}

impl Throughput {
    /// Measurements that are kept; all are dropped before one more is added.
    const LIMIT: usize = 256;

    /// Replaces the measurement of `work`.
    pub fn record(&self, key: ThroughputKey, work: Work, units: usize, took: Duration) {
        if units == 0 {
            return;
        }
        let mut table = self.seconds_per_unit.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= Self::LIMIT {
            table.clear();
        }
        table.insert((key, work), took.as_secs_f64() / units as f64);
    }

    /// Seconds that `units` of `work` will take; `None` if it was never measured.
    #[must_use]
    pub fn expect(&self, key: ThroughputKey, work: Work, units: usize) -> Option<f64> {
        let table = self.seconds_per_unit.lock().unwrap_or_else(PoisonError::into_inner);
        table.get(&(key, work)).map(|seconds| seconds * units as f64)
    }
}
