//! Keeps ControlNets.

use std::collections::HashMap;
use std::sync::Arc;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::device::interface::Quantization;
use crate::error::Result;
use crate::kernels::{Int8Rule, LoadPolicy, Loader};
use crate::layers::{Manager, Resident, ResidentForm};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::managers::budget::Budget;
use crate::model::managers::opened::{OpenedNetwork, load};
use crate::model::managers::shelf::{Shelf, ShelfKey};
use crate::model::networks::controlnet::{ControlNet, ControlNetConfig};
use crate::model::networks::controlnet_config::ControlNetConfigTask;
use crate::model::networks::unet::Unet;
use crate::model::weights::control_lora::{ControlLora, MARK};
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
    /// loaded if it is not in memory.
    ///
    /// # Errors
    /// `model_unsupported` for what is no ControlNet or one for another UNet, `model_corrupt`, `cancelled`,
    /// `deadline_exceeded`; device errors.
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
        let (of, over) = if is_lora { (checkpoint.key, Some(component_file.key)) } else { (component_file.key, None) };
        let form = ResidentForm { dtype, quantization, offloaded: false };
        let key = ShelfKey { checkpoint: of, over, form, device: placement.name.clone() };
        let shapes: HashMap<&str, &[usize]> = base.iter().chain([&weights]).flat_map(shapes_of).collect();
        let shape = |name: &str| shapes.get(name).copied();
        let config = ControlNetConfig::new(ControlNetConfigTask {
            name: &component_file.name,
            file: component_file.config()?,
            shapes: &shape,
            unet: &checkpoint.unet,
            reduction: checkpoint.vae.reduction(),
        })?;
        // A single file takes parts of its configuration from the UNet that it is used with, and that may be another now.
        if let Some(found) = self.shelf.get(&key).filter(|found| *found.config() == config) {
            return Ok(found);
        }
        ctx.stage(Stage::Load, || {
            let open = |weights| OpenedNetwork { component: "controlnet", weights, placement, dtype };
            let (opened, base) = (open(weights), base.map(open));
            // At most the whole UNet without its up blocks.
            let of_base = base.as_ref().map_or(Bytes(0), |base| base.bytes_of(|name| !name.starts_with("up_blocks.")));
            self.shelf.reserve(opened.bytes() + of_base);
            let build = |loader: &Loader| ControlNet::load(loader, &config);
            // Its blocks have the names of the UNet's.
            let int8 = (quantization == Quantization::Int8).then_some(Unet::bears_int8 as Int8Rule);
            let policy = LoadPolicy { int8, ..LoadPolicy::default() };
            let (controlnet, stats) = opened.with_source(ctx, |own| match &base {
                None => load(own, policy, build),
                Some(base) => base.with_source(ctx, |unet| load(&ControlLora { changes: own, unet }, policy, build)),
            })?;
            let bytes = Bytes(stats.bytes() as u64);
            Ok(self.shelf.insert(key, &component_file.name, bytes, controlnet))
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
