//! Keeps VAEs.

use std::sync::Arc;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::error::Result;
use crate::kernels::{LoadPolicy, Loader};
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::managers::budget::Budget;
use crate::model::managers::opened::OpenedNetwork;
use crate::model::managers::shelf::{Shelf, ShelfKey};
use crate::model::networks::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use crate::units::Bytes;

/// Both halves of the autoencoder.
pub struct Vae {
    pub encoder: VaeEncoder,
    pub decoder: VaeDecoder,
}

impl Vae {
    fn load(loader: &Loader, config: &VaeConfig) -> Result<Self> {
        Ok(Self { encoder: VaeEncoder::load(loader, config)?, decoder: VaeDecoder::load(loader, config)? })
    }
}

pub struct VaeManager {
    pub(crate) shelf: Shelf<Vae>,
}

impl VaeManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self { shelf: Shelf::new("vae", budget) }
    }

    /// The VAE of a checkpoint in the placement's vae dtype, loaded if it is not in memory.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; device errors.
    pub fn acquire(&mut self, checkpoint: &Checkpoint, placement: &Placement, ctx: &Context) -> Result<Arc<Vae>> {
        let dtype = placement.vae;
        let key = ShelfKey::new(checkpoint, placement, dtype);
        if let Some(found) = self.shelf.get(&key) {
            return Ok(found);
        }
        ctx.stage(Stage::Load, || {
            let opened = OpenedNetwork::part(checkpoint, Part::Vae, placement, ctx)?;
            self.shelf.reserve(opened.bytes());
            let (vae, bytes) = opened.load(LoadPolicy::default(), ctx, |loader| Vae::load(loader, &checkpoint.vae))?;
            Ok(self.shelf.insert(key, &checkpoint.name, bytes, vae))
        })
    }
}

impl Manager for VaeManager {
    fn resident(&self) -> Vec<Resident> {
        self.shelf.resident()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        self.shelf.evict(want)
    }
}
