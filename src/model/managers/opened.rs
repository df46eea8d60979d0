//! A network between opening its files and building it.

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::device::interface::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{LoadPolicy, LoadStats, Loader, WeightSource};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::weights::open::Weights;
use crate::model::weights::read::{Read, ReadTask, kept_bytes};
use crate::units::Bytes;

/// A network whose header was read, and whose weights are not read yet.
pub(crate) struct OpenedNetwork<'a> {
    /// Its name in progress messages.
    pub(crate) component: &'static str,
    pub(crate) weights: Weights,
    pub(crate) placement: &'a Placement,
    pub(crate) dtype: Dtype,
}

impl<'a> OpenedNetwork<'a> {
    /// A part of a checkpoint, in the placement's dtype for it.
    pub(crate) fn part(checkpoint: &Checkpoint, part: Part, placement: &'a Placement, ctx: &Context) -> Result<Self> {
        let dtype = if part == Part::Vae { placement.vae } else { placement.compute };
        Ok(Self { component: part.name(), weights: checkpoint.open(part, ctx)?, placement, dtype })
    }

    /// Bytes that all weights will take.
    pub(crate) fn bytes(&self) -> Bytes {
        self.bytes_of(|_| true)
    }

    /// Bytes that the weights will take whose names `wanted` accepts.
    pub(crate) fn bytes_of(&self, wanted: impl Fn(&str) -> bool) -> Bytes {
        kept_bytes(&self.weights, wanted, self.dtype, &self.placement.device)
    }

    /// Builds the network by `policy`. Returns it with the bytes that it holds.
    pub(crate) fn load<T>(
        &self,
        policy: LoadPolicy,
        ctx: &Context,
        build: impl FnOnce(&Loader) -> Result<T>,
    ) -> Result<(T, Bytes)> {
        let (network, stats) = self.with_source(ctx, |source| load(source, policy, build))?;
        Ok((network, Bytes(stats.bytes() as u64)))
    }

    /// Runs `build` with the weights, which are read as they are taken.
    pub(crate) fn with_source<T>(
        &self,
        ctx: &Context,
        build: impl FnOnce(&dyn WeightSource) -> Result<T>,
    ) -> Result<T> {
        let (component, device) = (self.component, &self.placement.device);
        let task = ReadTask { component, weights: &self.weights, compute: self.dtype, device };
        ctx.perform(&Read, task)?.build(ctx, build).map_err(|error| match error {
            Error::OutOfMemory { stage, needed: None, free, fits } => {
                Error::OutOfMemory { stage, needed: Some(self.bytes()), free, fits }
            }
            other => other,
        })
    }
}

/// Builds a network from `source` by `policy`.
pub(crate) fn load<T>(
    source: &dyn WeightSource,
    policy: LoadPolicy,
    build: impl FnOnce(&Loader) -> Result<T>,
) -> Result<(T, LoadStats)> {
    let loader = Loader::new(source, policy);
    let network = build(&loader)?;
    Ok((network, loader.take_stats()))
}
