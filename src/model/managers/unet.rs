//! Keeps UNets.

use std::sync::Arc;

use candle_core::Device;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::device::interface::Quantization;
use crate::error::Result;
use crate::kernels::LoadPolicy;
use crate::layers::{Manager, Resident, ResidentForm};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::budget::Budget;
use crate::model::managers::cached_network::{CachedNetwork, NetworkBuild, donors};
use crate::model::managers::opened::OpenedNetwork;
use crate::model::managers::shelf::{Shelf, ShelfKey};
use crate::model::networks::unet::Unet;
use crate::units::Bytes;

pub struct UnetManager {
    pub(crate) shelf: Shelf<CachedNetwork<Unet>>,
}

impl UnetManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self { shelf: Shelf::new("unet", budget) }
    }

    /// The form in which UNets of a placement are kept.
    pub(crate) fn form(placement: &Placement) -> ResidentForm {
        let Placement { compute, quantization, offloaded, .. } = *placement;
        ResidentForm { dtype: compute, quantization, offloaded }
    }

    /// The key of a checkpoint's unchanged UNet.
    pub(crate) fn key(checkpoint: &Checkpoint, placement: &Placement) -> ShelfKey {
        ShelfKey { form: Self::form(placement), ..ShelfKey::new(checkpoint, placement, placement.compute) }
    }

    /// The UNet of a checkpoint in the placement's compute dtype and quantization, loaded if it is not in memory.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; device errors.
    pub fn acquire(
        &mut self,
        checkpoint: &Checkpoint,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<CachedNetwork<Unet>>> {
        self.adapted(checkpoint, &LoraStack::default(), placement, ctx)
    }

    /// [`Self::acquire`], changed by adapters. Layers that they do not change are shared with other UNets in memory.
    ///
    /// # Errors
    /// The errors of [`Self::acquire`]; `model_unsupported` for a change that does not fit.
    pub fn adapted(
        &mut self,
        checkpoint: &Checkpoint,
        stack: &LoraStack,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<CachedNetwork<Unet>>> {
        let key = ShelfKey { over: stack.key(&[Part::Unet]), ..Self::key(checkpoint, placement) };
        if let Some(found) = self.shelf.get(&key) {
            return Ok(found);
        }
        ctx.stage(Stage::Load, || {
            let host = Placement { device: Device::Cpu, ..placement.clone() };
            let stays = if placement.offloaded { &host } else { placement };
            let opened = OpenedNetwork::part(checkpoint, Part::Unet, stays, ctx)?;
            let network = NetworkBuild::new(stack, Part::Unet, &donors(&self.shelf, &key), |unet| Some(unet));
            self.shelf.reserve_sharing(network.own_bytes(&opened), network.shared_bytes());
            let policy = match placement.quantization {
                Quantization::None => {
                    let offload = placement.offloaded.then(|| placement.device.clone());
                    LoadPolicy { offload, ..LoadPolicy::default() }
                }
                Quantization::Int8 => LoadPolicy { int8: Some(Unet::bears_int8), ..LoadPolicy::default() },
            };
            let unet = network.load(&opened, policy, ctx, |loader| Unet::load(loader, &checkpoint.unet))?;
            Ok(self.shelf.insert_sharing(key, &checkpoint.name, unet.bytes().clone(), unet))
        })
    }
}

impl Manager for UnetManager {
    fn resident(&self) -> Vec<Resident> {
        self.shelf.resident()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        self.shelf.evict(want)
    }
}
