//! Owns a generation's memory: plans it before the work, evicts what others left in memory, and degrades the plan when a
//! device runs out of memory.

use crate::context::Context;
use crate::device::instructor::{DeviceInstructor, MemoryStatus, Placement};
use crate::error::{Error, Result};
use crate::inference::managers::estimate::Estimator;
use crate::inference::plan::GenerationPlan;
use crate::inference::plan::memory_estimate::MemoryEstimate;
use crate::inference::plan::memory_policy::{AvailableMemory, MemoryDecision, decide, next_fallback};
use crate::inference::request::memory::{Fallback, Largest, MemoryPlan, MemoryStrategy, MemoryUse, Offload};
use crate::inference::request::result::Estimate;
use crate::layers::Resident;
use crate::managers::Managers;
use crate::managers::throughput::Throughput;
use crate::model::checkpoint::{Checkpoint, CheckpointKey, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::{ENCODERS, Reach};
use crate::model::weights::size::WeightFormat;
use crate::units::{Bytes, ImageSize};

/// Step between the sides that are tried for the largest image that fits, in pixels.
const SIDE_STEP: usize = 64;
/// Evictions that are tried until the system shows their bytes as free.
const EVICTIONS: usize = 4;

/// Plans the memory of generations.
#[derive(Clone, Copy)]
pub(crate) struct MemoryPlanner<'a> {
    pub(crate) device: &'a DeviceInstructor,
    /// Longest side of an image, in pixels.
    pub(crate) max_side: usize,
}

/// A generation to be planned. The plan and the placement take on the decision.
pub(crate) struct MemoryTask<'a> {
    pub(crate) plan: &'a mut GenerationPlan,
    pub(crate) placement: &'a mut Placement,
    /// Adapters of the request's model.
    pub(crate) stack: &'a LoraStack,
}

/// The memory plan in effect.
pub(crate) struct PlannedMemory {
    pub(crate) report: MemoryUse,
    estimate: MemoryEstimate,
}

/// Bytes that were missing in a stage of the work.
struct Shortage {
    stage: &'static str,
    needed: Bytes,
    free: Option<Bytes>,
}

impl MemoryPlanner<'_> {
    /// Plans the memory of a generation within what is free, and evicts what is in its way.
    ///
    /// # Errors
    /// `out_of_memory` if it cannot fit, before anything is loaded for it.
    pub(crate) fn plan_memory(
        &self,
        task: MemoryTask<'_>,
        managers: &mut Managers,
        ctx: &Context,
    ) -> Result<PlannedMemory> {
        let MemoryTask { plan, placement, stack } = task;
        plan.memory = plan.memory.quantized(placement.quantization)?;
        let status = self.device.memory_status(&managers.device);
        managers.model().begin(status);
        claim(plan, placement, stack, managers);
        let format = WeightFormat {
            compute: placement.compute,
            quantization: placement.quantization,
            on_host: placement.device.is_cpu(),
        };
        let estimator = Estimator { plan, stack, format, ctx };
        let estimate = estimator.memory(&managers.resident())?;
        let mut planning = Planning { planner: *self, estimator, managers, estimate, evicted: false };
        let report = match status {
            Some(MemoryStatus { free, .. }) => planning.fit(free)?,
            None => MemoryUse { plan: plan.memory.first(), ..MemoryUse::default() },
        };
        let estimate = planning.estimate;
        if !report.fallbacks.is_empty() {
            let (fallbacks, why) = (&report.fallbacks, &report.why);
            tracing::info!(request_id = ctx.request_id(), ?fallbacks, why, "memory is short");
        }
        apply(report.plan, plan, placement);
        for key in models(plan) {
            managers.model().drop_other_form(key, placement);
        }
        Ok(PlannedMemory { report, estimate })
    }

    /// Takes the next fallback after a device ran out of memory; the work then starts again.
    ///
    /// # Errors
    /// `out_of_memory`, with the bytes needed and free, after the last fallback; any other error as it is.
    pub(crate) fn degrade(
        &self,
        error: Error,
        planned: &mut PlannedMemory,
        task: MemoryTask<'_>,
        managers: &mut Managers,
        ctx: &Context,
    ) -> Result<()> {
        let Error::OutOfMemory { stage, .. } = error else { return Err(error) };
        let MemoryTask { plan, placement, .. } = task;
        let freed = managers.free_idle();
        let PlannedMemory { report, estimate } = planned;
        let Some((fallback, next)) = next_fallback(plan.memory, report) else {
            let free = self.device.free(&managers.device);
            let shortage = Shortage { stage, needed: estimate.needed(plan.memory_plan), free };
            return Err(self.out_of_memory(plan, estimate, shortage, managers));
        };
        tracing::warn!(request_id = ctx.request_id(), stage, %freed, ?fallback, "out of memory; started again with less");
        ctx.warn(format!("memory ran out in {stage}; the image was started again in a way that needs less"));
        report.fallbacks.push(fallback);
        report.plan = next;
        report.why.get_or_insert_with(|| format!("memory ran out in {stage}"));
        apply(next, plan, placement);
        Ok(())
    }

    /// Frees memory for a model that is not loaded, such as a refiner after its base.
    pub(crate) fn free_for(&self, checkpoint: &Checkpoint, managers: &mut Managers) {
        let is_loaded = |one: &Resident| one.kind == "unet" && one.name == checkpoint.name;
        if managers.resident().iter().any(is_loaded) {
            return;
        }
        let Some(free) = self.device.free(&managers.device) else { return };
        let short = checkpoint.file_bytes().saturating_sub(free);
        if short > Bytes(0) {
            managers.free_memory(short, Reach::Idle);
        }
    }

    /// Estimates a generation outside the compute thread, from what that thread published.
    ///
    /// # Errors
    /// `unsupported_feature` for a dtype or offload that the device excludes; those of the files' headers.
    pub(crate) fn estimate(&self, plan: &mut GenerationPlan, managers: &Managers, ctx: &Context) -> Result<Estimate> {
        let compute = self.device.dtype(&managers.device, plan.dtype)?;
        let quantization = self.device.quantization(plan.quantization);
        plan.memory = plan.memory.quantized(quantization)?;
        // Only its own thread can ask a GPU for its memory.
        let gpu = managers.published.memory().filter(|memory| !memory.on_host);
        let format = WeightFormat { compute, quantization, on_host: gpu.is_none() };
        let status = gpu.or_else(|| self.device.memory_status(&managers.device));
        let residents = managers.published.residents();
        let stack = LoraStack::open(&plan.loras, &plan.checkpoint, ctx)?;
        let estimator = Estimator { plan, stack: &stack, format, ctx };
        let estimate = estimator.memory(&residents)?;
        let others = residents.iter().filter(|one| !one.pinned && !plan.uses(one));
        let evictable = others.map(|one| one.bytes).sum();
        let available = status.map(|MemoryStatus { free, .. }| AvailableMemory { free, evictable });
        Ok(self.report(&estimator, &estimate, available, &managers.published.throughput))
    }

    fn report(
        &self,
        estimator: &Estimator<'_>,
        estimate: &MemoryEstimate,
        available: Option<AvailableMemory>,
        throughput: &Throughput,
    ) -> Estimate {
        let plan = estimator.plan;
        let first = plan.memory.first();
        let decision = available.map(|available| decide(estimate, plan.memory, available));
        let fits = decision.as_ref().map(|decision| decision.fits);
        let (memory, needed) = match decision {
            Some(MemoryDecision { report, needed, .. }) => (report, needed),
            None => (MemoryUse { plan: first, ..MemoryUse::default() }, estimate.needed(first)),
        };
        Estimate {
            weights: estimate.weights(),
            parts: estimate.parts(),
            activations: estimate.activations.peak(memory.plan),
            activations_unet: estimate.activations.denoise(memory.plan),
            activations_decode: estimate.activations.decode(memory.plan),
            needed,
            free: available.map(|available| available.free),
            fits,
            largest: available.and_then(|available| self.largest(plan, estimate, available)),
            memory,
            ways: strategies(plan, estimate, available),
            evaluations: estimator.evaluations(),
            seconds: estimator.seconds(throughput),
        }
    }

    fn out_of_memory(
        &self,
        plan: &GenerationPlan,
        estimate: &MemoryEstimate,
        shortage: Shortage,
        managers: &Managers,
    ) -> Error {
        let Shortage { stage, needed, free } = shortage;
        let residents = managers.resident();
        let pinned: Vec<&Resident> = residents.iter().filter(|one| one.pinned && !plan.uses(one)).collect();
        let mut hints = Vec::new();
        let available =
            AvailableMemory { free: free.unwrap_or_default(), evictable: managers.evictable(Reach::Others) };
        if let Some(Largest { width, height }) = self.largest(plan, estimate, available) {
            hints.push(format!("an image of about {width}×{height} would fit"));
        }
        if !pinned.is_empty() {
            let bytes: Bytes = pinned.iter().map(|one| one.bytes).sum();
            let mut names: Vec<String> = pinned.iter().map(|one| format!("`{}`", one.name)).collect();
            names.dedup();
            hints.push(format!("{bytes} are pinned: {}", names.join(", ")));
        }
        let fits = (!hints.is_empty()).then(|| hints.join("; "));
        Error::OutOfMemory { stage, needed: Some(needed), free, fits }
    }

    /// The largest image of the plan's proportions that fits, with any fallback that the request leaves open.
    fn largest(&self, plan: &GenerationPlan, estimate: &MemoryEstimate, available: AvailableMemory) -> Option<Largest> {
        let ImageSize { width, height } = plan.first().size;
        (1..=self.max_side / SIDE_STEP).rev().find_map(|count| {
            let longer = (count * SIDE_STEP) as f64 / width.max(height) as f64;
            let side = |side: usize| ((side as f64 * longer / SIDE_STEP as f64).round() as usize).max(1) * SIDE_STEP;
            let largest = Largest { width: side(width), height: side(height) };
            let scale = (largest.width * largest.height) as f64 / (width * height) as f64;
            decide(&estimate.scaled(scale), plan.memory, available).fits.then_some(largest)
        })
    }
}

/// A plan that is being fitted into the device's memory.
struct Planning<'a> {
    planner: MemoryPlanner<'a>,
    estimator: Estimator<'a>,
    managers: &'a mut Managers,
    /// With what is in memory now.
    estimate: MemoryEstimate,
    /// True once something was evicted.
    evicted: bool,
}

impl Planning<'_> {
    /// Decides for `free` bytes, and evicts as much as the decision needs.
    fn fit(&mut self, free: Bytes) -> Result<MemoryUse> {
        // Nothing is evicted for a generation that would not fit even then, nor more than its plan needs.
        let decision = self.decide(AvailableMemory { free, evictable: self.managers.evictable(Reach::Others) });
        let mut now = free;
        if !decision.fits {
            now = self.evict_idle(decision.needed, free)?;
        }
        now = self.evict_others(decision.report.plan, now)?;
        let MemoryDecision { mut report, needed, fits } =
            self.decide(AvailableMemory { free: now, evictable: Bytes(0) });
        if !fits {
            return Err(self.refusal(needed, now));
        }
        if self.evicted {
            report.fallbacks.insert(0, Fallback::Drop);
            report.why.get_or_insert_with(|| format!("{needed} needed, {free} free"));
        }
        Ok(report)
    }

    /// Evicts even networks that this request uses, if it then fits: text encoders that are freed later may not fit
    /// beside the networks for which they are freed. Returns the bytes that are free then.
    fn evict_idle(&mut self, needed: Bytes, free: Bytes) -> Result<Bytes> {
        let mut staying = self.managers.resident();
        staying.retain(|one| one.pinned || one.used_ms.is_none());
        let estimate = self.estimator.memory(&staying)?;
        let available = AvailableMemory { free, evictable: self.managers.evictable(Reach::Idle) };
        if !decide(&estimate, self.estimator.plan.memory, available).fits {
            return Err(self.refusal(needed, free));
        }
        self.managers.free_idle();
        self.evicted(free)
    }

    /// Evicts as much of other requests' networks as `plan` is short of. Returns the bytes that are free then.
    fn evict_others(&mut self, plan: MemoryPlan, mut free: Bytes) -> Result<Bytes> {
        for _ in 0..EVICTIONS {
            let short = self.estimate.needed(plan).saturating_sub(free);
            if short == Bytes(0)
                || self.managers.evictable(Reach::Others) == Bytes(0)
                || self.managers.free_memory(short, Reach::Others) == Bytes(0)
            {
                break;
            }
            free = self.evicted(free)?;
        }
        Ok(free)
    }

    /// Measures and estimates again: an adapted network may have shared its layers with one that was evicted.
    fn evicted(&mut self, before: Bytes) -> Result<Bytes> {
        self.evicted = true;
        self.estimate = self.estimator.memory(&self.managers.resident())?;
        Ok(self.planner.device.free(&self.managers.device).unwrap_or(before))
    }

    fn decide(&self, available: AvailableMemory) -> MemoryDecision {
        decide(&self.estimate, self.estimator.plan.memory, available)
    }

    fn refusal(&self, needed: Bytes, free: Bytes) -> Error {
        let shortage = Shortage { stage: "planning", needed, free: Some(free) };
        self.planner.out_of_memory(self.estimator.plan, &self.estimate, shortage, self.managers)
    }
}

/// Marks the networks in memory that the request will use, so that they are the last to be evicted.
fn claim(plan: &GenerationPlan, placement: &Placement, stack: &LoraStack, managers: &mut Managers) {
    let controlnets = || plan.controlnets.iter().map(|controlnet| controlnet.file.key);
    let adapted = [stack.key(&[Part::Unet]), stack.key(&ENCODERS)].into_iter().flatten();
    let over: Vec<CheckpointKey> = adapted.chain(controlnets()).collect();
    let bare = LoraStack::default();
    let adapters = plan.adapters.networks().map(|(_, file)| file.key);
    for key in models(plan).chain(controlnets()).chain(adapters) {
        let stack = if key == plan.checkpoint.key { stack } else { &bare };
        managers.model().claim(key, &over, stack, placement);
    }
}

/// The request's model and those of later passes.
fn models(plan: &GenerationPlan) -> impl Iterator<Item = CheckpointKey> + '_ {
    plan.passes.iter().map(|pass| pass.checkpoint.key)
}

/// Every fallback that the request leaves open, each on top of those before it.
fn strategies(
    plan: &GenerationPlan,
    estimate: &MemoryEstimate,
    available: Option<AvailableMemory>,
) -> Vec<MemoryStrategy> {
    let strategy = |fallback: Option<Fallback>, memory: MemoryPlan| {
        let needed = estimate.needed(memory);
        let fits = available.map(|AvailableMemory { free, evictable }| match fallback {
            None => needed <= free,
            Some(_) => needed <= free + evictable,
        });
        MemoryStrategy { fallback, needed, fits }
    };
    let mut memory = plan.memory.first();
    let mut strategies = vec![strategy(None, memory)];
    for fallback in Fallback::ALL {
        let Some(degraded) = plan.memory.degrade(memory, fallback) else { continue };
        memory = degraded;
        strategies.push(strategy(Some(fallback), memory));
    }
    strategies
}

fn apply(memory: MemoryPlan, plan: &mut GenerationPlan, placement: &mut Placement) {
    plan.memory_plan = memory;
    placement.offloaded = memory.offload == Offload::Sequential;
}
