//! Keeps VAEs.

use std::sync::Arc;

use super::{Opened, Shelf, ShelfKey};
use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::error::Result;
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::networks::vae::Vae;
use crate::units::Bytes;

pub struct VaeManager {
    pub(in crate::model) shelf: Shelf<Vae>,
}

impl VaeManager {
    #[must_use]
    pub fn new(capacity: Bytes) -> Self {
        Self { shelf: Shelf::new("vae", capacity) }
    }

    /// The VAE of a checkpoint in the placement's vae dtype, loaded if it is not here.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; those of the device.
    pub fn acquire(&mut self, checkpoint: &Checkpoint, placement: &Placement, ctx: &Context) -> Result<Arc<Vae>> {
        let dtype = placement.vae;
        let key = ShelfKey { checkpoint: checkpoint.key, dtype, device: placement.name.clone() };
        if let Some(found) = self.shelf.get(&key) {
            return Ok(found);
        }
        ctx.stage(Stage::Load, || {
            let opened = Opened::new(checkpoint, Part::Vae, placement, dtype, ctx)?;
            self.shelf.reserve(opened.bytes());
            let (vae, bytes) = opened.load(ctx, |vb| Vae::load(vb, &checkpoint.vae, dtype.tensor()))?;
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
