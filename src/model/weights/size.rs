//! Estimates the memory that a network's weights will take, from the headers of its files.

use crate::context::Context;
use crate::device::interface::{Dtype, Quantization};
use crate::error::Result;
use crate::kernels::{bytes_held, stays_as_stored};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::networks::unet::Unet;
use crate::model::weights::control_lora::MARK;
use crate::model::weights::ldm_names::RenameControl;
use crate::model::weights::open::{Stored, Weights};
use crate::model::weights::read::kept;
use crate::units::Bytes;

/// The form in which weights will be held.
#[derive(Clone, Copy, Debug)]
pub struct WeightFormat {
    pub compute: Dtype,
    /// Applies to UNets and ControlNets.
    pub quantization: Quantization,
    /// True if the CPU computes: it keeps narrow weights narrow, and large ones in their files.
    pub on_host: bool,
}

/// Bytes that weights take on the device that computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// All weights.
    pub total: Bytes,
    /// Part of `total` that stays in mapped files: memory that the system can reclaim.
    pub mapped: Bytes,
    /// Bytes taken instead of `total` if the weights are offloaded, including the largest layer while it is used.
    pub offloaded: Bytes,
    /// Part of `offloaded` that a layer takes only while it is used.
    pub transient: Bytes,
}

/// Bytes of the layers that adapters change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdaptedBytes {
    /// As the checkpoint has them.
    pub before: WeightBytes,
    /// Once adapted; none of it stays in a file.
    pub after: Bytes,
}

/// Estimates weights that will be held in `format`.
#[derive(Clone, Copy)]
pub struct SizeEstimator<'a> {
    pub format: WeightFormat,
    pub ctx: &'a Context,
}

impl SizeEstimator<'_> {
    /// One network of a checkpoint; the UNet as it is quantized.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn part(&self, checkpoint: &Checkpoint, part: Part) -> Result<WeightBytes> {
        Ok(all(&checkpoint.open(part, self.ctx)?, self.format_of(part)))
    }

    /// A network that has a file of its own.
    ///
    /// # Errors
    /// Those of [`ComponentFile::open`].
    pub fn component_file(&self, file: &ComponentFile) -> Result<WeightBytes> {
        Ok(all(&file.open(self.ctx)?, self.format))
    }

    /// A ControlNet for the UNet of `checkpoint`. A Control-LoRA includes the half of that UNet that it changes.
    ///
    /// # Errors
    /// Those of [`ComponentFile::open`] and [`Checkpoint::open`].
    pub fn controlnet(&self, file: &ComponentFile, checkpoint: &Checkpoint) -> Result<WeightBytes> {
        let weights = file.open(self.ctx)?;
        if !weights.has(MARK) {
            return Ok(all(&weights, self.format));
        }
        let (lora, unet) = (self.ctx.perform(&RenameControl, weights)?, checkpoint.open(Part::Unet, self.ctx)?);
        let own = sum(&lora, self.format, |name, tensor| {
            // The factors of a change are dropped once it is made.
            let is_factor = name == MARK || name.ends_with(".up") || name.ends_with(".down");
            (!is_factor).then_some(tensor)
        });
        let copied = sum(&unet, self.format, |name, tensor| {
            let is_used = !["up_blocks.", "conv_norm_out.", "conv_out."].iter().any(|part| name.starts_with(part));
            let is_changed = || name.strip_suffix(".weight").is_some_and(|layer| lora.has(&format!("{layer}.up")));
            let changed = WeightBytes { mapped: Bytes(0), offloaded: tensor.total, ..tensor };
            (is_used && !lora.has(name)).then(|| if is_changed() { changed } else { tensor })
        });
        Ok(own.with(copied))
    }

    /// The layers of a checkpoint's network that `stack` changes.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn adapted(&self, stack: &LoraStack, checkpoint: &Checkpoint, part: Part) -> Result<AdaptedBytes> {
        let changed = stack.fingerprints(part);
        if changed.is_empty() {
            return Ok(AdaptedBytes::default());
        }
        let format = self.format_of(part);
        let weights = checkpoint.open(part, self.ctx)?;
        let is_adapted = |name: &str| name.rsplit_once('.').is_some_and(|(layer, _)| changed.contains_key(layer));
        let before = sum(&weights, format, |name, tensor| is_adapted(name).then_some(tensor));
        // A network that computes in f32 keeps adapted layers in f32, in whatever dtype they were stored.
        let in_f32 = format.compute == Dtype::F32 && format.quantization == Quantization::None;
        let adapted = weights.tensors().filter(|(name, _)| in_f32 && is_adapted(name));
        let after = adapted.map(|(_, stored)| elements(stored) * 4).sum();
        Ok(AdaptedBytes { before, after: before.total.max(Bytes(after)) })
    }

    fn format_of(&self, part: Part) -> WeightFormat {
        let quantization = if part == Part::Unet { self.format.quantization } else { Quantization::None };
        WeightFormat { quantization, ..self.format }
    }
}

impl WeightBytes {
    /// Both together; their layers are used one at a time.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            mapped: self.mapped + other.mapped,
            offloaded: self.offloaded + other.offloaded,
            transient: self.transient.max(other.transient),
        }
    }

    fn unmapped(bytes: Bytes) -> Self {
        Self { total: bytes, offloaded: bytes, ..Self::default() }
    }
}

fn all(weights: &Weights, format: WeightFormat) -> WeightBytes {
    sum(weights, format, |_, tensor| Some(tensor))
}

/// Adds up what `counted` returns for each tensor, given its name and bytes.
fn sum(
    weights: &Weights,
    format: WeightFormat,
    counted: impl Fn(&str, WeightBytes) -> Option<WeightBytes>,
) -> WeightBytes {
    let (mut bytes, mut largest) = (WeightBytes::default(), Bytes(0));
    for (name, shard, stored) in weights.in_file_order() {
        let tensor = tensor(name, stored, weights.stays(shard, stored), format);
        let Some(tensor) = counted(name, tensor) else { continue };
        if stored.shape.len() > 1 {
            largest = largest.max(tensor.total);
        }
        bytes = bytes.with(tensor);
    }
    let offloaded = (bytes.offloaded + largest).min(bytes.total);
    WeightBytes { offloaded, transient: offloaded.saturating_sub(bytes.offloaded), ..bytes }
}

fn tensor(name: &str, stored: &Stored, in_file: bool, format: WeightFormat) -> WeightBytes {
    let WeightFormat { compute, quantization, on_host } = format;
    let is_matrix = stored.shape.len() > 1;
    let bears_int8 = || name.strip_suffix(".weight").is_some_and(|layer| Unet::bears_int8(layer, &stored.shape));
    if quantization == Quantization::Int8 && is_matrix && bears_int8() {
        return WeightBytes::unmapped(Bytes(elements(stored)));
    }
    let taps: usize = stored.shape.iter().skip(2).product();
    let (total, in_file, is_packed) = if on_host {
        let kept = kept(stored.dtype, compute, &candle_core::Device::Cpu);
        let held = kept.and_then(|format| bytes_held(&stored.shape, format, compute.tensor()));
        let total = Bytes(held.unwrap_or(0) as u64);
        let is_packed = taps > 1 && !stays_as_stored(&stored.shape, compute.tensor());
        (total, in_file && total == Bytes(stored.range.end - stored.range.start), is_packed)
    } else {
        (Bytes(elements(stored) * compute.tensor().size_in_bytes() as u64), true, true)
    };
    // Vectors are copied to f32.
    if !is_matrix {
        return WeightBytes::unmapped(total);
    }
    WeightBytes {
        total,
        mapped: if in_file && !is_packed { total } else { Bytes(0) },
        offloaded: if in_file { Bytes(0) } else { total },
        transient: Bytes(0),
    }
}

fn elements(stored: &Stored) -> u64 {
    stored.shape.iter().map(|&side| side as u64).product()
}
