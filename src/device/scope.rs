//! The scope of a request: the facts that dispatch establishes once, before an instructor runs.

use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::layers::Resident;

/// Where a request runs.
#[derive(Clone, Debug)]
pub enum RequestScope {
    /// On the compute thread, which owns the device and the networks.
    Compute { placement: Placement },
    /// On another lane, whose own managers stay empty.
    Query {
        /// Everything the compute thread kept in memory after its last job.
        residents: Vec<Resident>,
    },
}

impl RequestScope {
    /// The placement of tensors.
    ///
    /// # Errors
    /// `internal` outside the compute thread, where no tensors are made.
    pub fn placement(&self) -> Result<&Placement> {
        match self {
            Self::Compute { placement } => Ok(placement),
            Self::Query { .. } => Err(Error::bug("tensors were needed outside the compute thread")),
        }
    }

    /// Lends `resources` to an instructor within this scope.
    pub fn with<'a, R>(&'a self, resources: &'a mut R) -> ScopedResources<'a, R> {
        ScopedResources { resources, scope: self }
    }
}

/// The resources of an instructor that needs to know where its request runs.
pub struct ScopedResources<'a, R> {
    pub resources: &'a mut R,
    pub scope: &'a RequestScope,
}
