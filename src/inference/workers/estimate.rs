//! What a generation will need, before it begins: bytes from the configuration, seconds from what was measured.

use crate::context::Context;
use crate::device::interface::{Dtype, Quantization};
use crate::error::Result;
use crate::inference::interface::{DecodeExtent, Estimate};
use crate::inference::plan::GenerationPlan;
use crate::layers::Worker;
use crate::model::checkpoint::Checkpoint;
use crate::model::networks::vae::Extent;
use crate::pace::{Pace, Work};
use crate::units::{Bytes, ImageSize};

pub struct Appraise;

pub struct AppraiseTask<'a> {
    pub plan: &'a GenerationPlan,
    pub compute: Dtype,
    pub quantization: Quantization,
    /// Under which name the model's time is remembered.
    pub key: &'a str,
    pub pace: &'a Pace,
    /// Memory that is free now, weights that are loaded already not counted.
    pub free: Option<Bytes>,
    /// What of the model is in memory already.
    pub loaded: Bytes,
    pub decode: DecodeExtent,
}

impl Worker<AppraiseTask<'_>> for Appraise {
    type Output = Estimate;

    fn run(&self, task: AppraiseTask<'_>, ctx: &Context) -> Result<Estimate> {
        let AppraiseTask { plan, compute, quantization, key, pace, free, loaded, decode } = task;
        let passes = plan.guidance.all_roles().len();
        let of = |size: ImageSize| size.width * size.height / 64;
        let last = of(plan.last_size());
        let positions = of(plan.size).max(last);
        let bytes = |checkpoint: &Checkpoint| -> Result<Bytes> {
            Ok(match quantization {
                Quantization::None => checkpoint.file_bytes(),
                Quantization::Int8 => checkpoint.file_bytes().saturating_sub(checkpoint.int8_saves(ctx)?),
            })
        };
        let base = bytes(&plan.checkpoint)?;
        let other = plan.further.iter().find(|further| further.checkpoint.key != plan.checkpoint.key);
        let other = other.map_or(Ok(Bytes(0)), |further| bytes(&further.checkpoint))?;
        let first = |at: usize| plan.controls.iter().position(|other| other.net.key == plan.controls[at].net.key);
        let nets = (0..plan.controls.len()).filter(|&at| first(at) == Some(at));
        let beside = nets.map(|at| plan.controls[at].net.file_bytes()).sum::<Bytes>() + plan.adapters.file_bytes();
        let weights = base + other + beside;
        let element = compute.tensor().size_in_bytes();
        // The feed-forward of a transformer at half resolution is the UNet's largest moment: 4 + 2 times its channels
        // beside the skip connections. What ControlNets add stays while it runs, and a sum beside what is added to it.
        let added = 4 * plan.controls.len().min(2);
        let unet: usize =
            plan.checkpoint.unet.block_out_channels.iter().enumerate().fold(0, |sum, (level, channels)| {
                let here = (positions >> (2 * level)).max(1);
                sum + here * channels * (6 + 4 + added)
            });
        // A refiner takes its base's place where there is no room for both.
        let left = (base.max(other) + beside).saturating_sub(loaded);
        let activations = |extent| {
            let decoder = plan.checkpoint.vae.decode_bytes(64 * last, element, extent);
            Bytes((passes * unet * element).max(decoder) as u64)
        };
        let whole = activations(Extent::Whole);
        let activations = match (decode, free) {
            (DecodeExtent::Whole, _) | (DecodeExtent::Auto, None) => whole,
            (DecodeExtent::Auto, Some(free)) if left + whole <= free => whole,
            (DecodeExtent::Auto | DecodeExtent::Strips, _) => activations(Extent::Strips),
        };
        let images = plan.seeds.len();
        let runs = || {
            let further = plan.further.iter().map(|further| (&further.sampling, of(further.size)));
            std::iter::once((&plan.sampling, of(plan.size))).chain(further)
        };
        let units = runs().map(|(sampling, positions)| plan.guidance.evaluations(sampling) * positions).sum();
        let seconds = pace
            .expect(key, Work::Evaluation, units)
            .zip(pace.expect(key, Work::Decode, last))
            .map(|(denoise, decode)| (denoise + decode) * images as f64);
        let needed = left + activations;
        Ok(Estimate {
            weights,
            activations,
            needed,
            free,
            fits: free.map(|free| needed <= free),
            evaluations: runs().map(|(sampling, _)| sampling.evaluations()).sum::<usize>() * images,
            seconds,
        })
    }
}
