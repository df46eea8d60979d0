//! Keeps adapters that add images to a prompt: T2I-Adapters, IP-Adapters, and the image encoders of the latter.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::device::interface::Quantization;
use crate::error::Result;
use crate::kernels::{LoadPolicy, Loader};
use crate::layers::{Manager, Resident, ResidentForm};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::CheckpointKey;
use crate::model::managers::budget::Budget;
use crate::model::managers::opened::OpenedNetwork;
use crate::model::managers::shelf::{Shelf, ShelfKey};
use crate::model::networks::clip_vision::{ClipVision, ClipVisionConfig};
use crate::model::networks::ip_adapter::{IpAdapter, IpAdapterLayout};
use crate::model::networks::t2i_adapter::{T2iAdapter, T2iAdapterConfig};
use crate::model::weights::open::Weights;
use crate::units::Bytes;

/// An adapter, with counts of its file's tensors.
pub struct Adapter<T> {
    pub network: T,
    /// Tensors of the file that are part of the network.
    pub applied: usize,
    /// Tensors of the file that are not part of it.
    pub unused: usize,
}

pub struct AdapterManager {
    features: Shelf<Adapter<T2iAdapter>>,
    pictures: Shelf<Adapter<IpAdapter>>,
    encoders: Shelf<ClipVision>,
}

impl AdapterManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self {
            features: Shelf::new("t2i_adapter", budget),
            pictures: Shelf::new("ip_adapter", budget),
            encoders: Shelf::new("image_encoder", budget),
        }
    }

    /// A T2I-Adapter in the placement's compute dtype, loaded if it is not in memory.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; device errors.
    pub fn features(
        &mut self,
        found: &ComponentFile,
        config: &T2iAdapterConfig,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<Adapter<T2iAdapter>>> {
        let load = |weights: &Weights, loader: &Loader| {
            let (network, applied) = (T2iAdapter::load(loader, config)?, config.tensors());
            Ok(Adapter { network, applied, unused: weights.tensors().count().saturating_sub(applied) })
        };
        acquire(&mut self.features, found, placement, load, ctx)
    }

    /// An IP-Adapter in the placement's compute dtype, loaded if it is not in memory.
    ///
    /// # Errors
    /// The errors of [`Self::features`].
    pub fn pictures(
        &mut self,
        found: &ComponentFile,
        layout: &IpAdapterLayout,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<Adapter<IpAdapter>>> {
        let load = |weights: &Weights, loader: &Loader| {
            let (network, applied) = (IpAdapter::load(loader, layout)?, layout.tensors());
            Ok(Adapter { network, applied, unused: weights.tensors().count().saturating_sub(applied) })
        };
        acquire(&mut self.pictures, found, placement, load, ctx)
    }

    /// An image encoder in the placement's compute dtype, loaded if it is not in memory.
    ///
    /// # Errors
    /// The errors of [`Self::features`].
    pub fn encoder(
        &mut self,
        found: &ComponentFile,
        config: &ClipVisionConfig,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<ClipVision>> {
        let load = |_: &Weights, loader: &Loader| ClipVision::load(loader, config);
        acquire(&mut self.encoders, found, placement, load, ctx)
    }

    /// Marks networks of this file as used by the running request.
    pub(crate) fn claim(&mut self, key: CheckpointKey) {
        self.features.claim(key, &[], true, |_| true);
        self.pictures.claim(key, &[], true, |_| true);
        self.encoders.claim(key, &[], true, |_| true);
    }

    /// Drops everything. Returns the bytes that were freed.
    pub(crate) fn clear(&mut self) -> Bytes {
        let all: Option<CheckpointKey> = None;
        self.features.remove(all) + self.pictures.remove(all) + self.encoders.remove(all)
    }
}

/// Names and shapes of a file's tensors.
///
/// # Errors
/// `model_corrupt`, `cancelled`, `deadline_exceeded`.
pub fn shapes(found: &ComponentFile, ctx: &Context) -> Result<BTreeMap<String, Vec<usize>>> {
    let weights = found.open(ctx)?;
    Ok(weights.tensors().map(|(name, stored)| (name.to_owned(), stored.shape.clone())).collect())
}

/// The network on the shelf, loaded if it is not there.
fn acquire<T: 'static>(
    shelf: &mut Shelf<T>,
    found: &ComponentFile,
    placement: &Placement,
    load: impl FnOnce(&Weights, &Loader) -> Result<T>,
    ctx: &Context,
) -> Result<Arc<T>> {
    let key = ShelfKey {
        checkpoint: found.key,
        over: None,
        form: ResidentForm { dtype: placement.compute, quantization: Quantization::None, offloaded: false },
        device: placement.name.clone(),
    };
    if let Some(kept) = shelf.get(&key) {
        return Ok(kept);
    }
    ctx.stage(Stage::Load, || {
        let opened =
            OpenedNetwork { component: shelf.kind(), weights: found.open(ctx)?, placement, dtype: placement.compute };
        shelf.reserve(opened.bytes());
        let (network, bytes) = opened.load(LoadPolicy::default(), ctx, |loader| load(&opened.weights, loader))?;
        Ok(shelf.insert(key, &found.name, bytes, network))
    })
}

impl Manager for AdapterManager {
    fn resident(&self) -> Vec<Resident> {
        let shelves: [&dyn Manager; 3] = [&self.features, &self.pictures, &self.encoders];
        shelves.into_iter().flat_map(Manager::resident).collect()
    }

    /// Image encoders first: they are the largest, and their results are kept for as long as a request needs them.
    fn evict(&mut self, want: Bytes) -> Bytes {
        let shelves: [&mut dyn Manager; 3] = [&mut self.encoders, &mut self.pictures, &mut self.features];
        shelves.into_iter().fold(Bytes(0), |freed, shelf| freed + shelf.evict(want.saturating_sub(freed)))
    }
}
