//! The ladder that is climbed where memory is short: what a request leaves open is decided for less memory, one rung at a
//! time, until it fits. The rungs go from what costs nothing but a reload to what costs most time:
//!
//! 1. `drop`: caches and networks that the request does not use go, in the order of [`Managers::free_memory`].
//! 2. `strips`: pictures are decoded some rows at a time. The pixels are the same but for rounding.
//! 3. `slice`: guidance's passes are made one after another. They differ from those of one batch by rounding at most.
//! 4. `text_encoders`: they leave when the prompts have been encoded.
//! 5. `sequential`: the UNet's weights come a layer at a time. The pixels are the same.
//!
//! It is climbed before the work, by what is measured or set as the limit, and again when a device says that it has no
//! memory left.
//!
//! [`Managers::free_memory`]: crate::managers::Managers::make_room

use crate::device::interface::Quantization;
use crate::error::{Error, Result};
use crate::inference::interface::DecodeExtent;
use crate::inference::request::memory::{Fallback, MemoryOptions, MemoryPlan, MemoryUse, Offload};
use crate::inference::workers::estimate::Needs;
use crate::units::Bytes;

impl MemoryOptions {
    /// What is done where there is room.
    #[must_use]
    pub fn first(self) -> MemoryPlan {
        MemoryPlan {
            decode: self.decode,
            slice: self.slice.unwrap_or(false),
            offload: if self.offload == Offload::Auto { Offload::None } else { self.offload },
        }
    }

    /// The same for a network in `quantization`: bytes are made once, when a layer is loaded.
    ///
    /// # Errors
    /// `unsupported_feature` where it cannot be done as is wished.
    pub fn quantized(self, quantization: Quantization) -> Result<Self> {
        let whole_unet = quantization == Quantization::Int8;
        if whole_unet && self.offload == Offload::Sequential {
            return Err(Error::UnsupportedFeature {
                what: "`offload` `sequential` with int8".to_owned(),
                hint: Some("leave `offload` out, or set `quantization` to `none`".to_owned()),
                field: Some("offload".to_owned()),
            });
        }
        Ok(Self { whole_unet, ..self })
    }

    /// `means` one rung higher; `None` where the rung is taken, or not left open.
    #[must_use]
    pub fn degrade(self, means: MemoryPlan, fallback: Fallback) -> Option<MemoryPlan> {
        match fallback {
            Fallback::Drop => Some(means),
            Fallback::Strips => (self.decode == DecodeExtent::Auto && means.decode != DecodeExtent::Strips)
                .then_some(MemoryPlan { decode: DecodeExtent::Strips, ..means }),
            Fallback::Slice => (self.slice.is_none() && !means.slice).then_some(MemoryPlan { slice: true, ..means }),
            Fallback::TextEncoders => (self.offload == Offload::Auto && means.offload == Offload::None)
                .then_some(MemoryPlan { offload: Offload::TextEncoders, ..means }),
            Fallback::Sequential => {
                (self.offload == Offload::Auto && !self.whole_unet && means.offload != Offload::Sequential)
                    .then_some(MemoryPlan { offload: Offload::Sequential, ..means })
            }
        }
    }
}

/// What there is for a request.
#[derive(Clone, Copy, Debug)]
pub struct Available {
    /// Bytes free now.
    pub free: Bytes,
    /// Bytes that dropping what the request does not use would add.
    pub droppable: Bytes,
}

/// What was chosen for the room that there is.
#[derive(Clone, Debug)]
pub struct Choice {
    pub told: MemoryUse,
    /// Bytes still to be had.
    pub needed: Bytes,
    pub fits: bool,
}

/// The lowest rung at which a request fits, or the highest that helps where it does not.
#[must_use]
pub fn choose(needs: &Needs, options: MemoryOptions, available: Available) -> Choice {
    let Available { free, droppable } = available;
    let mut means = options.first();
    let mut needed = needs.needed(means);
    let mut fallbacks = Vec::new();
    let first = needed;
    let mut room = free;
    for fallback in Fallback::ALL {
        if needed <= room {
            break;
        }
        if fallback == Fallback::Drop {
            if droppable > Bytes(0) {
                fallbacks.push(fallback);
                room = room + droppable;
            }
            continue;
        }
        let Some(higher) = options.degrade(means, fallback) else { continue };
        let less = needs.needed(higher);
        // A rung that saves nothing costs time for nothing.
        if less < needed {
            (means, needed) = (higher, less);
            fallbacks.push(fallback);
        }
    }
    let why = (!fallbacks.is_empty()).then(|| format!("{first} needed, {free} free"));
    Choice { told: MemoryUse { means: settled(means), fallbacks, why }, needed, fits: needed <= room }
}

/// The next rung after a device had no memory left, whatever was planned: its own count is the true one.
#[must_use]
pub fn next(options: MemoryOptions, told: &MemoryUse) -> Option<(Fallback, MemoryPlan)> {
    let mut fallbacks = Fallback::ALL.into_iter().filter(|fallback| !told.fallbacks.contains(fallback));
    fallbacks.find_map(|fallback| options.degrade(told.means, fallback).map(|means| (fallback, means)))
}

/// `auto` that met no want of room is `whole`.
fn settled(means: MemoryPlan) -> MemoryPlan {
    let decode = if means.decode == DecodeExtent::Auto { DecodeExtent::Whole } else { means.decode };
    MemoryPlan { decode, ..means }
}
