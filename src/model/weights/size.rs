//! What the weights of a network will take, said by the headers of its files alone.

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

/// How weights will be held.
#[derive(Clone, Copy, Debug)]
pub struct Holding {
    pub compute: Dtype,
    pub quantization: Quantization,
    /// Whether the CPU computes, which keeps narrow weights narrow, and large ones in their files.
    pub on_host: bool,
}

/// Bytes of the memory of the device that computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weighed {
    /// All weights.
    pub bytes: Bytes,
    /// What of them stays in its files, which are mapped: memory that the system can take back.
    pub mapped: Bytes,
    /// What is taken where the network's weights stay away, its largest layer's included.
    pub away: Bytes,
    /// Of that, what is taken for a layer while it is used.
    pub passing: Bytes,
}

/// Layers that adapters change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// As the checkpoint has them.
    pub before: Weighed,
    /// Bytes as they are changed, of which nothing stays in a file.
    pub after: Bytes,
}

impl Touched {
    /// What `stack` changes of a part of a checkpoint.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn by(stack: &LoraStack, checkpoint: &Checkpoint, part: Part, holding: Holding, ctx: &Context) -> Result<Self> {
        let marks = stack.fingerprints(part);
        if marks.is_empty() {
            return Ok(Self::default());
        }
        let quantization = if part == Part::Unet { holding.quantization } else { Quantization::None };
        let weights = checkpoint.open(part, ctx)?;
        let touched = |name: &str| name.rsplit_once('.').is_some_and(|(layer, _)| marks.contains_key(layer));
        let before =
            Weighed::sum(&weights, Holding { quantization, ..holding }, |name, one| touched(name).then_some(one));
        // A network that computes in f32 keeps in f32 what is changed, however it was stored.
        let wide = holding.compute == Dtype::F32 && quantization == Quantization::None;
        let own = weights.tensors().filter(|(name, _)| wide && touched(name));
        let wide: u64 = own.map(|(_, stored)| stored.shape.iter().map(|&side| side as u64).product::<u64>() * 4).sum();
        Ok(Self { before, after: before.bytes.max(Bytes(wide)) })
    }
}

impl Weighed {
    /// Of a part of a checkpoint; of the UNet as it is quantised.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn part(checkpoint: &Checkpoint, part: Part, holding: Holding, ctx: &Context) -> Result<Self> {
        let quantization = if part == Part::Unet { holding.quantization } else { Quantization::None };
        Ok(Self::of(&checkpoint.open(part, ctx)?, Holding { quantization, ..holding }))
    }

    /// Of a network beside a checkpoint.
    ///
    /// # Errors
    /// Those of [`ComponentFile::open`].
    pub fn component_file(component_file: &ComponentFile, holding: Holding, ctx: &Context) -> Result<Self> {
        Ok(Self::of(&component_file.open(ctx)?, holding))
    }

    /// Of a ControlNet for the UNet of `checkpoint`, with the half of it that a Control-LoRA lies over.
    ///
    /// # Errors
    /// Those of [`ComponentFile::open`] and [`Checkpoint::open`].
    pub fn control(
        component_file: &ComponentFile,
        checkpoint: &Checkpoint,
        holding: Holding,
        ctx: &Context,
    ) -> Result<Self> {
        let upper = component_file.open(ctx)?;
        if !upper.has(MARK) {
            return Ok(Self::of(&upper, holding));
        }
        let (upper, lower) = (ctx.perform(&RenameControl, upper)?, checkpoint.open(Part::Unet, ctx)?);
        let own = Self::sum(&upper, holding, |name, one| {
            // What a change is made of goes when it is made.
            let is_change = name == MARK || name.ends_with(".up") || name.ends_with(".down");
            (!is_change).then_some(one)
        });
        let copied = Self::sum(&lower, holding, |name, one| {
            let is_used = !["up_blocks.", "conv_norm_out.", "conv_out."].iter().any(|part| name.starts_with(part));
            let changed = || name.strip_suffix(".weight").is_some_and(|layer| upper.has(&format!("{layer}.up")));
            let anew = Self { mapped: Bytes(0), away: one.bytes, ..one };
            (is_used && !upper.has(name)).then(|| if changed() { anew } else { one })
        });
        Ok(Self {
            bytes: own.bytes + copied.bytes,
            mapped: own.mapped + copied.mapped,
            away: own.away + copied.away,
            passing: own.passing.max(copied.passing),
        })
    }

    fn of(weights: &Weights, holding: Holding) -> Self {
        Self::sum(weights, holding, |_, one| Some(one))
    }

    /// Of those tensors that `taken` gives something for, by their names and weights.
    fn sum(weights: &Weights, holding: Holding, taken: impl Fn(&str, Self) -> Option<Self>) -> Self {
        let (mut all, mut largest) = (Self::default(), Bytes(0));
        for (name, shard, stored) in weights.in_file_order() {
            let one = Self::tensor((name, stored), weights.stays(shard, stored), holding);
            let Some(one) = taken(name, one) else { continue };
            let layer = if stored.shape.len() > 1 { one.bytes } else { Bytes(0) };
            largest = largest.max(layer);
            all = Self {
                bytes: all.bytes + one.bytes,
                mapped: all.mapped + one.mapped,
                away: all.away + one.away,
                ..all
            };
        }
        let away = (all.away + largest).min(all.bytes);
        Self { away, passing: away.saturating_sub(all.away), ..all }
    }

    fn tensor((name, stored): (&str, &Stored), in_file: bool, holding: Holding) -> Self {
        let Holding { compute, quantization, on_host } = holding;
        let elements: u64 = stored.shape.iter().map(|&side| side as u64).product();
        let whole = |bytes| Self { bytes, away: bytes, ..Self::default() };
        let in_bytes = || {
            let layer = name.strip_suffix(".weight")?;
            (stored.shape.len() > 1 && Unet::bears_int8(layer, &stored.shape)).then_some(whole(Bytes(elements)))
        };
        if let Some(quantized) = in_bytes().filter(|_| quantization == Quantization::Int8) {
            return quantized;
        }
        let taps: usize = stored.shape.iter().skip(2).product();
        let (bytes, in_file, laid) = match on_host {
            true => {
                let kept = kept(stored.dtype, compute, &candle_core::Device::Cpu);
                let bytes = kept.and_then(|coding| bytes_held(&stored.shape, coding, compute.tensor()));
                let bytes = Bytes(bytes.unwrap_or(0) as u64);
                let laid = taps > 1 && !stays_as_stored(&stored.shape, compute.tensor());
                (bytes, in_file && bytes == Bytes(stored.range.end - stored.range.start), laid)
            }
            false => (Bytes(elements * compute.tensor().size_in_bytes() as u64), true, true),
        };
        match stored.shape.len() {
            // What is not a matrix is kept in f32 beside its file.
            0 | 1 => whole(bytes),
            _ => Self {
                bytes,
                mapped: if in_file && !laid { bytes } else { Bytes(0) },
                away: if in_file { Bytes(0) } else { bytes },
                passing: Bytes(0),
            },
        }
    }
}
