//! Keeps text encoders: those of a checkpoint together, as a prompt needs both.

use std::sync::Arc;

use crate::context::{Context, Stage};
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::lora::{Adapting, Kept, donors};
use crate::model::managers::{Budget, Opened, Shelf, ShelfKey};
use crate::model::networks::clip::ClipTextModel;
use crate::units::Bytes;

/// The networks that are kept together.
pub const ENCODERS: [Part; 2] = [Part::TextEncoder, Part::TextEncoder2];

/// The text encoders of one checkpoint.
pub struct TextEncoders {
    /// CLIP ViT-L; the refiner has none.
    pub first: Option<Kept<ClipTextModel>>,
    /// OpenCLIP ViT-bigG, with the projection that gives the pooled embedding.
    pub second: Kept<ClipTextModel>,
}

pub struct EncoderManager {
    pub(crate) shelf: Shelf<TextEncoders>,
}

impl EncoderManager {
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self { shelf: Shelf::new("encoder", budget) }
    }

    /// The encoders of a checkpoint in the placement's compute dtype, loaded if they are not here.
    ///
    /// # Errors
    /// `model_corrupt`, `model_unsupported`, `cancelled`, `deadline_exceeded`; those of the device.
    pub fn acquire(
        &mut self,
        checkpoint: &Checkpoint,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Arc<TextEncoders>> {
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
    ) -> Result<Arc<TextEncoders>> {
        let dtype = placement.compute;
        let over = stack.key(&ENCODERS);
        let key = ShelfKey { over, ..ShelfKey::new(checkpoint, placement, dtype) };
        if let Some(encoders) = self.shelf.get(&key) {
            return Ok(encoders);
        }
        ctx.stage(Stage::Load, || {
            let open = |part| Opened::new(checkpoint, part, placement, dtype, ctx);
            let with_config = |config| Ok::<_, Error>((config, open(Part::TextEncoder)?));
            let first = checkpoint.text_encoder.as_ref().map(with_config).transpose()?;
            let second = open(Part::TextEncoder2)?;
            let donors = donors(&self.shelf, &key);
            let first_changes = Adapting::new(stack, Part::TextEncoder, &donors, |encoders| encoders.first.as_ref());
            let second_changes = Adapting::new(stack, Part::TextEncoder2, &donors, |encoders| Some(&encoders.second));
            drop(donors);
            let first_bytes = first.as_ref().map_or(Bytes(0), |(_, opened)| first_changes.bytes(opened));
            let shared = first_changes.shares().clone().with(second_changes.shares().clone());
            self.shelf.reserve_beside(first_bytes + second_changes.bytes(&second), &shared);
            let tensor = dtype.tensor();
            let first = first
                .map(|(config, opened)| {
                    first_changes.load(&opened, ctx, |vb| ClipTextModel::load(vb, config, false, tensor))
                })
                .transpose()?
                .map(|first| first.kept(Bytes(0)));
            let config = &checkpoint.text_encoder_2;
            let second = second_changes.load(&second, ctx, |vb| ClipTextModel::load(vb, config, true, tensor))?;
            let second = second.kept(Bytes(0));
            let held = first.as_ref().map(|first| first.held().clone()).unwrap_or_default().with(second.held().clone());
            Ok(self.shelf.insert_held(key, &checkpoint.name, held, TextEncoders { first, second }))
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
