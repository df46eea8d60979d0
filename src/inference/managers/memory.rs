//! Where an image's weights and feature maps go: what they need is estimated, the ladder is climbed before the work, and
//! again when a device has no memory left.

use crate::context::Context;
use crate::device::instructor::{Placement, Room};
use crate::device::interface::{Dtype, Quantization};
use crate::error::{Error, Result};
use crate::inference::instructor::{InferenceInstructor, throughput_key};
use crate::inference::interface::{Estimate, GenerateRequest, Response};
use crate::inference::plan::GenerationPlan;
use crate::inference::plan::controlnet::is_of;
use crate::inference::plan::memory_policy::{Available, Choice, choose, next};
use crate::inference::request::memory::{Fallback, Largest, MemoryPlan, MemoryStrategy, MemoryUse, Offload};
use crate::inference::workers::estimate::{EstimateTask, Estimation, Needs};
use crate::layers::{Manager as _, Resident};
use crate::managers::Managers;
use crate::model::checkpoint::{CheckpointKey, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::{ENCODERS, Reach};
use crate::model::weights::size::Holding;
use crate::units::Bytes;

/// Sides of the sizes that are tried for the largest that fits, in pixels.
const STEP: usize = 64;
/// How often what others use is dropped until the system shows it as free.
const TRIES: usize = 4;

/// How the images of a request are made.
pub(crate) struct Settled {
    pub(crate) told: MemoryUse,
    needs: Needs,
}

impl InferenceInstructor {
    /// What the generation would need; nothing is made.
    ///
    /// # Errors
    /// Those of [`Self::plan`].
    pub fn estimate(&self, request: &GenerateRequest, resources: &mut Managers, ctx: &Context) -> Result<Response> {
        let mut plan = self.plan(request, resources)?;
        let compute = self.device.dtype(&resources.device, plan.dtype)?;
        let quantization = self.device.quantization(plan.quantization);
        plan.memory = plan.memory.quantized(quantization)?;
        let residents = resources.published.residents();
        // Where a GPU computes, only its own thread can ask it.
        let gpu = resources.published.room().filter(|(_, on_host)| !on_host);
        let on_host = gpu.is_none();
        let room = gpu.map(|(room, _)| room).or_else(|| self.device.room(&resources.device));
        let stack = LoraStack::open(&plan.loras, &plan.checkpoint, ctx)?;
        let needs = self.appraise((&plan, &stack), (compute, quantization, on_host), &residents, resources, ctx)?;
        let others = residents.iter().filter(|one| !one.pinned && !is_of(&plan, one));
        let droppable = others.map(|one| one.bytes).sum();
        let available = room.map(|Room { free, .. }| Available { free, droppable });
        Ok(Response::Estimate(self.told(&plan, &needs, available)))
    }

    fn told(&self, plan: &GenerationPlan, needs: &Needs, available: Option<Available>) -> Estimate {
        let first = plan.memory.first();
        let choice = available.map(|available| choose(needs, plan.memory, available));
        let (memory, needed) = match &choice {
            Some(choice) => (choice.told.clone(), choice.needed),
            None => (MemoryUse { means: first, ..MemoryUse::default() }, needs.needed(first)),
        };
        let fits = |needed: Bytes, dropped: bool| {
            available.map(|Available { free, droppable }| needed <= free + if dropped { droppable } else { Bytes(0) })
        };
        let mut ways = vec![MemoryStrategy {
            fallback: None,
            needed: needs.needed(first),
            fits: fits(needs.needed(first), false),
        }];
        let mut means = first;
        for fallback in Fallback::ALL {
            let Some(higher) = plan.memory.degrade(means, fallback) else { continue };
            means = higher;
            ways.push(MemoryStrategy {
                fallback: Some(fallback),
                needed: needs.needed(means),
                fits: fits(needs.needed(means), true),
            });
        }
        Estimate {
            weights: needs.weights(),
            parts: needs.parts(),
            activations: needs.activations(memory.means),
            activations_unet: needs.denoise(memory.means),
            activations_decode: needs.decode(memory.means),
            needed,
            free: available.map(|available| available.free),
            fits: choice.as_ref().map(|choice| choice.fits),
            largest: available.and_then(|available| self.largest(plan, needs, available)),
            memory,
            ways,
            evaluations: needs.evaluations,
            seconds: needs.seconds,
        }
    }

    fn appraise(
        &self,
        (plan, stack): (&GenerationPlan, &LoraStack),
        (compute, quantization, on_host): (Dtype, Quantization, bool),
        residents: &[Resident],
        resources: &Managers,
        ctx: &Context,
    ) -> Result<Needs> {
        let holding = Holding { compute, quantization, on_host };
        let key = throughput_key(&plan.checkpoint, compute, quantization);
        ctx.perform(
            &Estimation,
            EstimateTask { plan, stack, holding, key: &key, throughput: &resources.published.throughput, residents },
        )
    }

    /// Decides how the images are made in the room that there is, and makes place for them. `stack` lies over the model's own
    /// networks.
    ///
    /// # Errors
    /// `out_of_memory` where they cannot, before anything is loaded for it.
    pub(crate) fn settle(
        &self,
        plan: &mut GenerationPlan,
        placement: &mut Placement,
        stack: &LoraStack,
        (resources, ctx): (&mut Managers, &Context),
    ) -> Result<Settled> {
        plan.memory = plan.memory.quantized(placement.quantization)?;
        let on_host = placement.device.is_cpu();
        let room = self.device.room(&resources.device);
        resources.model().begin(room, on_host);
        let own = [plan.checkpoint.key].into_iter().chain(plan.further.iter().map(|further| further.checkpoint.key));
        let controls: Vec<CheckpointKey> = plan.controls.iter().map(|control| control.net.key).collect();
        let adapted = [stack.key(&[Part::Unet]), stack.key(&ENCODERS)].into_iter().flatten();
        let over: Vec<CheckpointKey> = adapted.chain(controls.iter().copied()).collect();
        let none = LoraStack::default();
        let beside = controls.iter().copied().chain(plan.adapters.networks().map(|(_, found)| found.key));
        for key in own.chain(beside) {
            let stack = if key == plan.checkpoint.key { stack } else { &none };
            resources.model().claim(key, &over, (stack, placement));
        }
        let holding = (placement.compute, placement.quantization, on_host);
        let mut needs = self.appraise((plan, stack), holding, &resources.resident(), resources, ctx)?;
        let first = plan.memory.first();
        let mut free = room.map(|room| room.free);
        let mut dropped = None;
        // Nothing is dropped for what would not fit even so, nor more than the way needs that is gone then.
        let planned = free.map(|free| {
            choose(&needs, plan.memory, Available { free, droppable: droppable(resources, Reach::Others) })
        });
        if let (Some(Choice { needed, fits: false, .. }), Some(now)) = (&planned, free) {
            // Text encoders that leave may not fit beside the networks for which they left.
            let stays: Vec<Resident> =
                resources.resident().into_iter().filter(|one| one.pinned || one.used_ms.is_none()).collect();
            let anew = self.appraise((plan, stack), holding, &stays, resources, ctx)?;
            let idle = Available { free: now, droppable: droppable(resources, Reach::Idle) };
            if !choose(&anew, plan.memory, idle).fits {
                return Err(self.refused(plan, &needs, ("planning", *needed, now), resources));
            }
            resources.free_memory(Bytes(u64::MAX), Reach::Idle);
            (dropped, free) = (free, self.device.free(&resources.device));
            needs = self.appraise((plan, stack), holding, &resources.resident(), resources, ctx)?;
        }
        let means = planned.map_or(first, |planned| planned.told.means);
        for _ in 0..TRIES {
            let Some(short) = free.map(|free| needs.needed(means).saturating_sub(free)) else { break };
            if short == Bytes(0)
                || droppable(resources, Reach::Others) == Bytes(0)
                || resources.free_memory(short, Reach::Others) == Bytes(0)
            {
                break;
            }
            dropped = dropped.or(free);
            free = self.device.free(&resources.device);
            // What adapters leave as it is may have lain in a network that went.
            needs = self.appraise((plan, stack), holding, &resources.resident(), resources, ctx)?;
        }
        let Some(free) = free else {
            self.settled(plan, placement, resources);
            return Ok(Settled { told: MemoryUse { means: first, ..MemoryUse::default() }, needs });
        };
        let Choice { mut told, needed, fits } = choose(&needs, plan.memory, Available { free, droppable: Bytes(0) });
        if !fits {
            return Err(self.refused(plan, &needs, ("planning", needed, free), resources));
        }
        if let Some(before) = dropped {
            told.fallbacks.insert(0, Fallback::Drop);
            told.why.get_or_insert(format!("{needed} needed, {before} free"));
        }
        if !told.fallbacks.is_empty() {
            tracing::info!(request_id = ctx.request_id(), fallbacks = ?told.fallbacks, why = told.why, "memory is short");
        }
        apply(told.means, plan, placement);
        self.settled(plan, placement, resources);
        Ok(Settled { told, needs })
    }

    /// UNets that lie elsewhere than was decided go.
    fn settled(&self, plan: &GenerationPlan, placement: &Placement, resources: &mut Managers) {
        let further = plan.further.iter().map(|further| further.checkpoint.key);
        for key in [plan.checkpoint.key].into_iter().chain(further) {
            resources.model().settled(key, placement);
        }
    }

    /// After a device had no memory left: the next rung, for which the work is to begin again.
    ///
    /// # Errors
    /// `out_of_memory`, with what was needed and free, after the last rung; any other error as it is.
    pub(crate) fn degrade(
        &self,
        error: Error,
        settled: &mut Settled,
        plan: &mut GenerationPlan,
        placement: &mut Placement,
        (resources, ctx): (&mut Managers, &Context),
    ) -> Result<()> {
        let Error::OutOfMemory { stage, .. } = error else { return Err(error) };
        let freed = resources.free_memory(Bytes(u64::MAX), Reach::Idle);
        let Some((fallback, means)) = next(plan.memory, &settled.told) else {
            let free = self.device.free(&resources.device).unwrap_or_default();
            return Err(self.refused(plan, &settled.needs, (stage, settled.needs.needed(plan.means), free), resources));
        };
        tracing::warn!(request_id = ctx.request_id(), stage, %freed, ?fallback, "out of memory; begun again in less");
        ctx.warn(format!("memory ran out in {stage}; the image was begun again in a way that takes less"));
        settled.told.fallbacks.push(fallback);
        settled.told.means = means;
        settled.told.why.get_or_insert(format!("memory ran out in {stage}"));
        apply(means, plan, placement);
        Ok(())
    }

    fn refused(
        &self,
        plan: &GenerationPlan,
        needs: &Needs,
        (stage, needed, free): (&'static str, Bytes, Bytes),
        resources: &Managers,
    ) -> Error {
        let residents = resources.resident();
        let pinned: Vec<&Resident> = residents.iter().filter(|one| one.pinned && !is_of(plan, one)).collect();
        let mut hints = Vec::new();
        let available = Available { free, droppable: droppable(resources, Reach::Others) };
        if let Some(Largest { width, height }) = self.largest(plan, needs, available) {
            hints.push(format!("an image of about {width}×{height} would fit"));
        }
        if !pinned.is_empty() {
            let bytes: Bytes = pinned.iter().map(|one| one.bytes).sum();
            let mut names: Vec<String> = pinned.iter().map(|one| format!("`{}`", one.name)).collect();
            names.dedup();
            hints.push(format!("{bytes} are pinned: {}", names.join(", ")));
        }
        let fits = (!hints.is_empty()).then(|| hints.join("; "));
        Error::OutOfMemory { stage, needed, free, fits }
    }

    /// The largest size of the plan's proportions that fits, in whichever way the request leaves open.
    fn largest(&self, plan: &GenerationPlan, needs: &Needs, available: Available) -> Option<Largest> {
        let (width, height) = (plan.size.width, plan.size.height);
        let most = self.settings.max_side as usize / STEP;
        (1..=most).rev().find_map(|count| {
            let longer = (count * STEP) as f64 / width.max(height) as f64;
            let side = |side: usize| ((side as f64 * longer / STEP as f64).round() as usize).max(1) * STEP;
            let found = Largest { width: side(width), height: side(height) };
            let scale = (found.width * found.height) as f64 / (width * height) as f64;
            choose(&needs.scaled(scale), plan.memory, available).fits.then_some(found)
        })
    }
}

/// Bytes that can go.
fn droppable(resources: &Managers, reach: Reach) -> Bytes {
    let caches =
        resources.conditioning.embeddings.resident().into_iter().chain(resources.conditioning.hints.resident());
    caches.map(|one| one.bytes).sum::<Bytes>() + resources.conditioning.model.budget.evictable(reach)
}

fn apply(means: MemoryPlan, plan: &mut GenerationPlan, placement: &mut Placement) {
    plan.means = means;
    placement.away = means.offload == Offload::Sequential;
}
