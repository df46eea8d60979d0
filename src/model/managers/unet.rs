//! Keeps UNets.

use std::sync::Arc;

use candle_core::Device;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::device::interface::Quantization;
use crate::error::Result;
use crate::kernels::{away, quantizing};
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::lora::{Adapting, Kept, donors};
use crate::model::managers::{AFAR, Budget, Opened, Shelf, ShelfKey};
use crate::model::networks::unet::Unet;
use crate::units::Bytes;

pub struct UnetManager {
    pub(crate) shelf: Shelf<Kept<Unet>>,
}

impl UnetManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self { shelf: Shelf::new("unet", budget) }
    }

    /// Under which key a UNet is kept.
    pub(crate) fn key(checkpoint: &Checkpoint, placement: &Placement) -> ShelfKey {
        let quantization = placement.quantization;
        let device = if placement.away { format!("{}{AFAR}", placement.name) } else { placement.name.clone() };
        ShelfKey { quantization, device, ..ShelfKey::new(checkpoint, placement, placement.compute) }
    }

    /// The UNet of a checkpoint in the placement's compute dtype and quantization, loaded if it is not here.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; those of the device.
    pub fn acquire(
        &mut self,
        checkpoint: &Checkpoint,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<Kept<Unet>>> {
        self.adapted(checkpoint, &LoraStack::default(), placement, ctx)
    }

    /// [`Self::acquire`], changed by adapters. What they do not change is shared with the others that are here.
    ///
    /// # Errors
    /// Those of [`Self::acquire`]; `model_unsupported` for a change that does not fit.
    pub fn adapted(
        &mut self,
        checkpoint: &Checkpoint,
        stack: &LoraStack,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<Kept<Unet>>> {
        let dtype = placement.compute;
        let key = ShelfKey { over: stack.key(&[Part::Unet]), ..Self::key(checkpoint, placement) };
        if let Some(found) = self.shelf.get(&key) {
            return Ok(found);
        }
        ctx.stage(Stage::Load, || {
            let host = Placement { device: Device::Cpu, ..placement.clone() };
            let lies = if placement.away { &host } else { placement };
            let opened = Opened::new(checkpoint, Part::Unet, lies, dtype, ctx)?;
            let adapting = Adapting::new(stack, Part::Unet, &donors(&self.shelf, &key), |unet| Some(unet));
            self.shelf.reserve_beside(adapting.bytes(&opened), adapting.shares());
            let load = || adapting.load(&opened, ctx, |vb| Unet::load(vb, &checkpoint.unet));
            let (loaded, saved) = match placement.quantization {
                Quantization::None if placement.away => (away(&placement.device, load), 0),
                Quantization::None => (load(), 0),
                Quantization::Int8 => quantizing(Unet::bears_int8, load),
            };
            let unet = loaded?.kept(Bytes(saved as u64));
            Ok(self.shelf.insert_held(key, &checkpoint.name, unet.held().clone(), unet))
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
