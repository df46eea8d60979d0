//! Images to latents and back, with the VAE of the request's model.

use std::time::Instant;

use candle_core::Tensor;

use crate::context::Stage;
use crate::device::instructor::DeviceInstructor;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::inference::managers::{Session, throughput_key};
use crate::inference::plan::GenerationPlan;
use crate::inference::request::memory::DecodeExtent;
use crate::inference::workers::decode::{Decode, DecodeTask};
use crate::inference::workers::latents::{EncodeLatents, EncodeLatentsTask};
use crate::managers::throughput::Work;
use crate::model::networks::vae::Extent;
use crate::noise::NoiseSource;

/// Latents of `pixels`, sampled with `noise` if it is given.
pub(super) fn encode(
    plan: &GenerationPlan,
    pixels: &Tensor,
    noise: Option<&mut NoiseSource>,
    session: &mut Session<'_>,
) -> Result<Tensor> {
    let Session { placement, managers, ctx } = session;
    let vae = managers.model().vaes.acquire(&plan.checkpoint, placement, ctx)?;
    let config = &plan.checkpoint.vae;
    let extent = if plan.memory_plan.decode == DecodeExtent::Strips { Extent::Strips } else { Extent::Whole };
    let task = EncodeLatentsTask { vae: &vae, config, pixels, noise, extent, placement };
    ctx.stage(Stage::Encode, || ctx.perform(&EncodeLatents, task))
}

/// The image of `latents`.
pub(super) fn decode(
    plan: &GenerationPlan,
    latents: &Tensor,
    device: &DeviceInstructor,
    session: &mut Session<'_>,
) -> Result<Rgb8> {
    let Session { placement, managers, ctx } = session;
    let vae = managers.model().vaes.acquire(&plan.checkpoint, placement, ctx)?;
    let begun = Instant::now();
    let images = ctx.stage(Stage::Decode, || {
        let (decoder, config) = (&vae.decoder, &plan.checkpoint.vae);
        let free = device.free(&managers.device);
        // An extent that was left open is chosen by the memory that is free now.
        let is_open = plan.memory.decode == DecodeExtent::Auto && plan.memory_plan.decode != DecodeExtent::Strips;
        let options = if is_open { DecodeExtent::Auto } else { plan.memory_plan.decode };
        ctx.perform(&Decode, DecodeTask { decoder, config, latents, placement, options, free })
    })?;
    let units = latents.elem_count() / plan.checkpoint.vae.latent_channels.max(1);
    let key = throughput_key(&plan.checkpoint, placement);
    managers.published.throughput.record(key, Work::Decode, units, begun.elapsed());
    images.into_iter().next().ok_or_else(|| Error::bug("the decoder gave no image"))
}
