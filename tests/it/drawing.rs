//! Generates images without the wire, and measures the distance of latents from a reference.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use candle_core::{DType, Tensor};
use sdxl_worker::context::Context;
use sdxl_worker::device::instructor::Placement;
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::inference::instructor::InferenceInstructor;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::inference::managers::Session;
use sdxl_worker::inference::managers::pipeline::Pipeline;
use sdxl_worker::inference::plan::GenerationPlan;
use sdxl_worker::managers::Managers;
use sdxl_worker::runtime::config::Config;
use sdxl_worker::runtime::dispatch::Instructors;

pub(crate) struct Worker {
    pub(crate) instructors: Instructors,
    pub(crate) managers: Managers,
}

impl Worker {
    /// A worker with the default configuration.
    pub(crate) fn new() -> Self {
        Self::with(&Config::default())
    }

    pub(crate) fn with(config: &Config) -> Self {
        let settings = &config.workers.instructors;
        let managers = Managers::new(&settings.model, Arc::default());
        Self { instructors: Instructors::new(settings).unwrap(), managers }
    }

    /// The latents, `[1, C, H, W]`, and pixels of each image of a request.
    pub(crate) fn draw(&mut self, request: &GenerateRequest) -> Vec<(Tensor, Rgb8)> {
        let ctx = Context::detached();
        let inference = &self.instructors.inference;
        let plan = inference.plan(request, &mut self.managers).unwrap();
        let placement = inference.device.place(&mut self.managers.device, plan.dtype).unwrap();
        let placement = placement.quantized(plan.quantization).unwrap();
        plan.seeds
            .iter()
            .map(|&seed| {
                let mut pipeline = Pipeline::new(&plan, inference.domains(), &ctx).unwrap();
                let mut session = Session { placement: &placement, managers: &mut self.managers, ctx: &ctx };
                let latents = pipeline.latents(&plan, seed, &mut session).unwrap();
                let pixels = pipeline.pixels(&plan, &latents, &mut session).unwrap();
                (latents.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap(), pixels)
            })
            .collect()
    }
}

/// Latents of the first image of a plan.
pub(crate) fn latents(
    inference: &InferenceInstructor,
    plan: &GenerationPlan,
    placement: &Placement,
    managers: &mut Managers,
    ctx: &Context,
) -> sdxl_worker::error::Result<Tensor> {
    let mut session = Session { placement, managers, ctx };
    Pipeline::new(plan, inference.domains(), ctx)?.latents(plan, plan.seeds[0], &mut session)
}

/// Largest |Δ| over the standard deviation of the reference.
pub(crate) fn distance(ours: &Tensor, reference: &Tensor) -> f64 {
    let (ours, reference) = (ours.to_dtype(DType::F64).unwrap(), reference.to_dtype(DType::F64).unwrap());
    let worst = (&ours - &reference).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    let std = reference.flatten_all().unwrap().var(0).unwrap().to_scalar::<f64>().unwrap().sqrt();
    worst / std
}
