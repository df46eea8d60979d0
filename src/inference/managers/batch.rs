//! Makes the images of one request one after another, and in less memory if the device runs out of it.

use crate::context::{Context, Engine, Progress, Stage};
use crate::device::instructor::Placement;
use crate::error::Result;
use crate::image::pixels::Rgb8;
use crate::inference::managers::memory::MemoryTask;
use crate::inference::managers::pipeline::Pipeline;
use crate::inference::managers::{Domains, Session};
use crate::inference::plan::GenerationPlan;
use crate::inference::plan::infotext::infotext;
use crate::inference::request::result::{Generated, Image};
use crate::inference::workers::paste::{PasteBack, PasteTask};
use crate::managers::Managers;
use crate::postprocessing::instructor::Delivery;

/// The images of one request.
pub(crate) struct Batch<'a> {
    pub(crate) domains: Domains<'a>,
}

impl Batch<'_> {
    /// Makes and delivers every image of `plan`.
    ///
    /// # Errors
    /// Those of loading, of the networks and of delivery; `out_of_memory` if no fallback is left.
    pub(crate) fn generate(
        &self,
        mut plan: GenerationPlan,
        managers: &mut Managers,
        ctx: &Context,
    ) -> Result<Generated> {
        let placed = self.domains.device.place(&mut managers.device, plan.dtype)?;
        let mut placement = placed.quantized(plan.quantization)?;
        announce(&placement, ctx);
        plan.dtype = Some(placement.compute);
        plan.quantization = Some(placement.quantization);
        let mut pipeline = Pipeline::new(&plan, self.domains, ctx)?;
        let memory = self.domains.memory;
        let task = MemoryTask { plan: &mut plan, placement: &mut placement, stack: pipeline.stack() };
        let mut planned = memory.plan_memory(task, managers, ctx)?;
        let mut images = Vec::with_capacity(plan.seeds.len());
        // Each image is computed alone: it depends on its own request only, to the last bit.
        for (index, seed) in plan.seeds.clone().into_iter().enumerate() {
            let pixels = loop {
                let mut session = Session { placement: &placement, managers, ctx };
                let latents = pipeline.latents(&plan, seed, &mut session);
                match latents.and_then(|latents| pipeline.pixels(&plan, &latents, &mut session)) {
                    Ok(pixels) => break pixels,
                    Err(error) => {
                        let stack = pipeline.stack();
                        let task = MemoryTask { plan: &mut plan, placement: &mut placement, stack };
                        memory.degrade(error, &mut planned, task, managers, ctx)?;
                    }
                }
            };
            let pixels = match pipeline.paste() {
                Some(paste) => ctx.perform(&PasteBack, PasteTask { painted: &pixels, paste })?,
                None => pixels,
            };
            images.push(self.deliver(&plan, index, &pixels, ctx)?);
        }
        Ok(Generated {
            images,
            model: plan.checkpoint.name.clone(),
            parameters: Box::new((&plan).into()),
            embeddings: pipeline.embeddings(),
            cache: pipeline.cache(),
            memory: planned.report,
            adapters: pipeline.adapters(),
        })
    }

    fn deliver(&self, plan: &GenerationPlan, index: usize, pixels: &Rgb8, ctx: &Context) -> Result<Image> {
        let seed = plan.seeds[index];
        let delivered = ctx.stage(Stage::Write, || {
            let text = infotext(plan, seed)?;
            let delivery = Delivery { plan: &plan.output, image: pixels, index, text: Some(&text) };
            self.domains.postprocessing.deliver(delivery, ctx)
        })?;
        ctx.progress(Progress::Image { index, path: delivered.path.clone(), seed: seed.main });
        Ok(Image {
            path: delivered.path,
            base64: delivered.base64,
            format: plan.output.format.name,
            seed: seed.main,
            subseed: seed.variation.map(|variation| variation.seed),
            width: pixels.width,
            height: pixels.height,
        })
    }
}

/// Tells the client what computes its images.
fn announce(placement: &Placement, ctx: &Context) {
    ctx.computed_by(Engine {
        device: placement.name.clone(),
        dtype: placement.compute.name(),
        quantization: placement.quantization.name(),
    });
}
