//! Generates images without the wire, and measures the distance of latents from a reference.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use candle_core::{DType, Tensor};
use sdxl_worker::context::Context;
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::inference::interface::GenerateRequest;
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
                let latents = inference.latents(&plan, seed, &placement, &mut self.managers, &ctx).unwrap();
                let pixels = inference.pixels(&plan, &latents, &placement, &mut self.managers, &ctx).unwrap();
                (latents.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap(), pixels)
            })
            .collect()
    }
}

/// Largest |Δ| over the standard deviation of the reference.
pub(crate) fn distance(ours: &Tensor, reference: &Tensor) -> f64 {
    let (ours, reference) = (ours.to_dtype(DType::F64).unwrap(), reference.to_dtype(DType::F64).unwrap());
    let worst = (&ours - &reference).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    let std = reference.flatten_all().unwrap().var(0).unwrap().to_scalar::<f64>().unwrap().sqrt();
    worst / std
}
