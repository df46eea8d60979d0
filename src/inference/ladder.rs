//! The ladder that is climbed where memory is short: what a request leaves open is decided for less memory, one rung at a
//! time, until it fits. The rungs go from what costs nothing but a reload to what costs most time:
//!
//! 1. `drop`: caches and networks that the request does not use go, in the order of [`Managers::make_room`].
//! 2. `strips`: pictures are decoded some rows at a time. The pixels are the same but for rounding.
//! 3. `slice`: guidance's passes are made one after another. They differ from those of one batch by rounding at most.
//! 4. `text_encoders`: they leave when the prompts have been encoded.
//! 5. `sequential`: the UNet's weights come a layer at a time. The pixels are the same.
//!
//! It is climbed before the work, by what is measured or set as the limit, and again when a device says that it has no
//! memory left.
//!
//! [`Managers::make_room`]: crate::managers::Managers::make_room

use super::interface::DecodeExtent;
use super::memory::{Means, MemoryUse, MemoryWish, Offload, Rung};
use super::workers::estimate::Needs;
use crate::device::interface::Quantization;
use crate::error::{Error, Result};
use crate::units::Bytes;

impl MemoryWish {
    /// What is done where there is room.
    #[must_use]
    pub fn first(self) -> Means {
        Means {
            decode: self.decode,
            slice: self.slice.unwrap_or(false),
            offload: if self.offload == Offload::Auto { Offload::None } else { self.offload },
        }
    }

    /// The same for a network in `quantization`: bytes are made once, when a layer is loaded.
    ///
    /// # Errors
    /// `unsupported_feature` where it cannot be done as is wished.
    pub fn quantised(self, quantization: Quantization) -> Result<Self> {
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
    pub fn climb(self, means: Means, rung: Rung) -> Option<Means> {
        match rung {
            Rung::Drop => Some(means),
            Rung::Strips => (self.decode == DecodeExtent::Auto && means.decode != DecodeExtent::Strips)
                .then_some(Means { decode: DecodeExtent::Strips, ..means }),
            Rung::Slice => (self.slice.is_none() && !means.slice).then_some(Means { slice: true, ..means }),
            Rung::TextEncoders => (self.offload == Offload::Auto && means.offload == Offload::None)
                .then_some(Means { offload: Offload::TextEncoders, ..means }),
            Rung::Sequential => {
                (self.offload == Offload::Auto && !self.whole_unet && means.offload != Offload::Sequential)
                    .then_some(Means { offload: Offload::Sequential, ..means })
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
pub fn choose(needs: &Needs, wish: MemoryWish, available: Available) -> Choice {
    let Available { free, droppable } = available;
    let mut means = wish.first();
    let mut needed = needs.needed(means);
    let mut rungs = Vec::new();
    let first = needed;
    let mut room = free;
    for rung in Rung::ALL {
        if needed <= room {
            break;
        }
        if rung == Rung::Drop {
            if droppable > Bytes(0) {
                rungs.push(rung);
                room = room + droppable;
            }
            continue;
        }
        let Some(higher) = wish.climb(means, rung) else { continue };
        let less = needs.needed(higher);
        // A rung that saves nothing costs time for nothing.
        if less < needed {
            (means, needed) = (higher, less);
            rungs.push(rung);
        }
    }
    let why = (!rungs.is_empty()).then(|| format!("{first} needed, {free} free"));
    Choice { told: MemoryUse { means: settled(means), rungs, why }, needed, fits: needed <= room }
}

/// The next rung after a device had no memory left, whatever was planned: its own count is the true one.
#[must_use]
pub fn next(wish: MemoryWish, told: &MemoryUse) -> Option<(Rung, Means)> {
    let mut rungs = Rung::ALL.into_iter().filter(|rung| !told.rungs.contains(rung));
    rungs.find_map(|rung| wish.climb(told.means, rung).map(|means| (rung, means)))
}

/// `auto` that met no want of room is `whole`.
fn settled(means: Means) -> Means {
    let decode = if means.decode == DecodeExtent::Auto { DecodeExtent::Whole } else { means.decode };
    Means { decode, ..means }
}
