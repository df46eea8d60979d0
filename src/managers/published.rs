//! State of the compute thread that other threads may read.

use std::sync::{Mutex, PoisonError};

use crate::device::instructor::MemoryStatus;
use crate::layers::Resident;
use crate::managers::throughput::Throughput;

/// Written by the compute thread after each job.
#[derive(Debug, Default)]
pub struct Published {
    pub throughput: Throughput,
    residents: Mutex<Vec<Resident>>,
    memory: Mutex<Option<MemoryStatus>>,
}

impl Published {
    /// Everything the compute thread kept in memory after its last job.
    #[must_use]
    pub fn residents(&self) -> Vec<Resident> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Memory of its device after its last job.
    #[must_use]
    pub fn memory(&self) -> Option<MemoryStatus> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, residents: Vec<Resident>, memory: Option<MemoryStatus>) {
        *self.residents.lock().unwrap_or_else(PoisonError::into_inner) = residents;
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
    }
}
