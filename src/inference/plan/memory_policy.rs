//! Chooses how an image is made if memory is short. Choices that a request leaves open fall back to ones that need less,
//! one at a time, until the generation fits. Fallbacks are in the order of their cost, from a reload to much time:
//!
//! 1. `drop`: caches, and networks that the request does not use, are evicted in the order of [`Managers::free_memory`].
//! 2. `strips`: images are decoded some rows at a time. The pixels are the same up to rounding.
//! 3. `slice`: guidance runs its passes one after another, which differ from those of one batch by rounding at most.
//! 4. `text_encoders`: the text encoders are freed once the prompts are encoded.
//! 5. `sequential`: the UNet's weights are copied to the device a layer at a time. The pixels are the same.
//!
//! They are chosen before the work, by the memory that is measured or configured, and again whenever a device reports
//! that it is out of memory.
//!
//! [`Managers::free_memory`]: crate::managers::Managers::free_memory

use crate::device::interface::Quantization;
use crate::error::{Error, Result};
use crate::inference::plan::memory_estimate::MemoryEstimate;
use crate::inference::request::memory::{DecodeExtent, Fallback, MemoryOptions, MemoryPlan, MemoryUse, Offload};
use crate::units::Bytes;

impl MemoryOptions {
    /// The plan if memory is plentiful.
    #[must_use]
    pub fn first(self) -> MemoryPlan {
        MemoryPlan {
            decode: self.decode,
            slice: self.slice.unwrap_or(false),
            offload: if self.offload == Offload::Auto { Offload::None } else { self.offload },
        }
    }

    /// The same for a UNet in `quantization`: weights are quantized once, when a layer is loaded.
    ///
    /// # Errors
    /// `unsupported_feature` if the requested `offload` excludes it.
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

    /// `plan` with `fallback`; `None` if it is in effect already, or excluded by the request.
    #[must_use]
    pub fn degrade(self, plan: MemoryPlan, fallback: Fallback) -> Option<MemoryPlan> {
        let is_open = match fallback {
            Fallback::Drop => true,
            Fallback::Strips => self.decode == DecodeExtent::Auto && plan.decode != DecodeExtent::Strips,
            Fallback::Slice => self.slice.is_none() && !plan.slice,
            Fallback::TextEncoders => self.offload == Offload::Auto && plan.offload == Offload::None,
            Fallback::Sequential => {
                self.offload == Offload::Auto && !self.whole_unet && plan.offload != Offload::Sequential
            }
        };
        is_open.then_some(match fallback {
            Fallback::Drop => plan,
            Fallback::Strips => MemoryPlan { decode: DecodeExtent::Strips, ..plan },
            Fallback::Slice => MemoryPlan { slice: true, ..plan },
            Fallback::TextEncoders => MemoryPlan { offload: Offload::TextEncoders, ..plan },
            Fallback::Sequential => MemoryPlan { offload: Offload::Sequential, ..plan },
        })
    }
}

/// Memory that a request can have.
#[derive(Clone, Copy, Debug)]
pub struct AvailableMemory {
    /// Bytes free now.
    pub free: Bytes,
    /// Bytes that evicting everything the request does not use would add.
    pub evictable: Bytes,
}

/// The choice for the memory that is available.
#[derive(Clone, Debug)]
pub struct MemoryDecision {
    pub report: MemoryUse,
    /// Bytes to allocate.
    pub needed: Bytes,
    pub fits: bool,
}

/// Takes as few fallbacks as needed for the generation to fit, or all that help if it does not.
#[must_use]
pub fn decide(estimate: &MemoryEstimate, options: MemoryOptions, available: AvailableMemory) -> MemoryDecision {
    let AvailableMemory { free, evictable } = available;
    let mut plan = options.first();
    let mut needed = estimate.needed(plan);
    let mut fallbacks = Vec::new();
    let first = needed;
    let mut usable = free;
    for fallback in Fallback::ALL {
        if needed <= usable {
            break;
        }
        if fallback == Fallback::Drop {
            if evictable > Bytes(0) {
                fallbacks.push(fallback);
                usable = usable + evictable;
            }
            continue;
        }
        let Some(degraded) = options.degrade(plan, fallback) else { continue };
        let less = estimate.needed(degraded);
        // A fallback that saves nothing only costs time.
        if less < needed {
            (plan, needed) = (degraded, less);
            fallbacks.push(fallback);
        }
    }
    // `auto` that did not fall back to `strips` is `whole`.
    if plan.decode == DecodeExtent::Auto {
        plan.decode = DecodeExtent::Whole;
    }
    let why = (!fallbacks.is_empty()).then(|| format!("{first} needed, {free} free"));
    MemoryDecision { report: MemoryUse { plan, fallbacks, why }, needed, fits: needed <= usable }
}

/// The next fallback after a device ran out of memory. Estimates do not matter then: the device knows better.
#[must_use]
pub fn next_fallback(options: MemoryOptions, report: &MemoryUse) -> Option<(Fallback, MemoryPlan)> {
    let mut fallbacks = Fallback::ALL.into_iter().filter(|fallback| !report.fallbacks.contains(fallback));
    fallbacks.find_map(|fallback| options.degrade(report.plan, fallback).map(|plan| (fallback, plan)))
}
