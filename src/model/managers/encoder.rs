//! Keeps text encoders: both of a checkpoint together, as a prompt needs both.

use std::sync::Arc;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::kernels::LoadPolicy;
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::budget::Budget;
use crate::model::managers::cached_network::{CachedNetwork, NetworkBuild, donors};
use crate::model::managers::opened::OpenedNetwork;
use crate::model::managers::shelf::{Shelf, ShelfKey};
use crate::model::networks::clip::ClipTextModel;
use crate::units::Bytes;

/// The parts of a checkpoint that are kept together.
pub const ENCODERS: [Part; 2] = [Part::TextEncoder, Part::TextEncoder2];

/// The text encoders of one checkpoint.
pub struct TextEncoders {
    /// CLIP ViT-L; the refiner has none.
    pub first: Option<CachedNetwork<ClipTextModel>>,
    /// OpenCLIP ViT-bigG, with the projection that gives the pooled embedding.
    pub second: CachedNetwork<ClipTextModel>,
}

pub struct EncoderManager {
    pub(crate) shelf: Shelf<TextEncoders>,
}

impl EncoderManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self { shelf: Shelf::new("encoder", budget) }
    }

    /// The encoders of a checkpoint in the placement's compute dtype, loaded if they are not in memory.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; device errors.
    pub fn acquire(
        &mut self,
        checkpoint: &Checkpoint,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<TextEncoders>> {
        self.adapted(checkpoint, &LoraStack::default(), placement, ctx)
    }

    /// [`Self::acquire`], changed by adapters. Layers that they do not change are shared with other encoders in memory.
    ///
    /// # Errors
    /// The errors of [`Self::acquire`]; `model_unsupported` for a change that does not fit.
    pub fn adapted(
        &mut self,
        checkpoint: &Checkpoint,
        stack: &LoraStack,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<TextEncoders>> {
        let dtype = placement.compute;
        let over = stack.key(&ENCODERS);
        let key = ShelfKey { over, ..ShelfKey::new(checkpoint, placement, dtype) };
        if let Some(encoders) = self.shelf.get(&key) {
            return Ok(encoders);
        }
        ctx.stage(Stage::Load, || {
            let open = |part| OpenedNetwork::part(checkpoint, part, placement, ctx);
            let with_config = |config| Ok::<_, Error>((config, open(Part::TextEncoder)?));
            let first = checkpoint.text_encoder.as_ref().map(with_config).transpose()?;
            let second = open(Part::TextEncoder2)?;
            let donors = donors(&self.shelf, &key);
            let first_build = NetworkBuild::new(stack, Part::TextEncoder, &donors, |encoders| encoders.first.as_ref());
            let second_build = NetworkBuild::new(stack, Part::TextEncoder2, &donors, |encoders| Some(&encoders.second));
            drop(donors);
            let first_bytes = first.as_ref().map_or(Bytes(0), |(_, opened)| first_build.own_bytes(opened));
            let shared = first_build.shared_bytes().clone().with(second_build.shared_bytes().clone());
            self.shelf.reserve_sharing(first_bytes + second_build.own_bytes(&second), &shared);
            let tensor = dtype.tensor();
            let first = first
                .map(|(config, opened)| {
                    first_build.load(&opened, LoadPolicy::default(), ctx, |loader| {
                        ClipTextModel::load(loader, config, false, tensor)
                    })
                })
                .transpose()?;
            let config = &checkpoint.text_encoder_2;
            let second = second_build.load(&second, LoadPolicy::default(), ctx, |loader| {
                ClipTextModel::load(loader, config, true, tensor)
            })?;
            let bytes = first.as_ref().map(|first| first.bytes().clone()).unwrap_or_default();
            let bytes = bytes.with(second.bytes().clone());
            Ok(self.shelf.insert_sharing(key, &checkpoint.name, bytes, TextEncoders { first, second }))
        })
    }
}

impl Manager for EncoderManager {
    fn resident(&self) -> Vec<Resident> {
        self.shelf.resident()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        self.shelf.evict(want)
    }
}
