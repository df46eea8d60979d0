//! Keeps ControlNets.

use std::collections::HashMap;
use std::sync::Arc;

use candle_nn::VarBuilder;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::device::interface::Quantization;
use crate::error::Result;
use crate::kernels::quantizing;
use crate::layers::{Manager, Resident};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::managers::{Budget, Opened, Shelf, ShelfKey};
use crate::model::networks::controlnet::{ControlNet, ControlNetConfig};
use crate::model::networks::unet::Unet;
use crate::model::weights::control_lora::{MARK, over};
use crate::model::weights::ldm_names::RenameControl;
use crate::model::weights::open::Weights;
use crate::units::Bytes;

pub struct ControlNetManager {
    pub(crate) shelf: Shelf<ControlNet>,
}

impl ControlNetManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self { shelf: Shelf::new("controlnet", budget) }
    }

    /// The ControlNet of these files in the placement's compute dtype and quantization, for the UNet of `checkpoint`,
    /// loaded if it is not here.
    ///
    /// # Errors
    /// `model_unsupported` for what is no ControlNet or one for another UNet, `model_corrupt`, `cancelled`,
    /// `deadline_exceeded`; those of the device.
    pub fn acquire(
        &mut self,
        component_file: &ComponentFile,
        checkpoint: &Checkpoint,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<ControlNet>> {
        let (dtype, quantization) = (placement.compute, placement.quantization);
        let weights = component_file.open(ctx)?;
        let is_lora = weights.tensors().any(|(name, _)| name == MARK);
        let weights = ctx.perform(&RenameControl, weights)?;
        let base = is_lora.then(|| checkpoint.open(Part::Unet, ctx)).transpose()?;
        let (of, laid) = if is_lora { (checkpoint.key, Some(component_file.key)) } else { (component_file.key, None) };
        let key = ShelfKey { checkpoint: of, over: laid, dtype, quantization, device: placement.name.clone() };
        let shapes: HashMap<&str, &[usize]> = base.iter().chain([&weights]).flat_map(shapes_of).collect();
        let shape = |name: &str| shapes.get(name).copied();
        let model = (&checkpoint.unet, checkpoint.vae.reduction());
        let config = ControlNetConfig::new(&component_file.name, component_file.config()?, &shape, model)?;
        // What a single file does not say is as in the UNet that it is used with, and that may be another one now.
        if let Some(found) = self.shelf.get(&key).filter(|found| *found.config() == config) {
            return Ok(found);
        }
        ctx.stage(Stage::Load, || {
            let open = |weights| Opened { component: "controlnet", weights, placement, dtype };
            let (opened, base) = (open(weights), base.map(open));
            // Of the UNet at most all but its way up.
            let of_base = base.as_ref().map_or(Bytes(0), |base| base.bytes_of(|name| !name.starts_with("up_blocks.")));
            self.shelf.reserve(opened.bytes() + of_base);
            let net = |vb: &VarBuilder| ControlNet::load(vb, &config);
            let load = || match &base {
                None => opened.load(ctx, net),
                Some(base) => {
                    let both = |upper: &VarBuilder| base.load(ctx, |lower| over(upper, lower, net));
                    opened.load(ctx, both).map(|(((net, bytes), _), _)| (net, bytes))
                }
            };
            let (loaded, saved) = match quantization {
                Quantization::None => (load(), 0),
                // Its blocks have the names of the UNet's.
                Quantization::Int8 => quantizing(Unet::bears_int8, load),
            };
            let (net, bytes) = loaded?;
            let bytes = bytes.saturating_sub(Bytes(saved as u64));
            Ok(self.shelf.insert(key, &component_file.name, bytes, net))
        })
    }
}

fn shapes_of(weights: &Weights) -> impl Iterator<Item = (&str, &[usize])> {
    weights.tensors().map(|(name, stored)| (name, stored.shape.as_slice()))
}

impl Manager for ControlNetManager {
    fn resident(&self) -> Vec<Resident> {
        self.shelf.resident()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        self.shelf.evict(want)
    }
}
