//! Prompts as the UNet takes them: everything that stays the same from step to step, computed once.

use std::ops::Range;

use candle_core::Tensor;

use crate::conditioning::image_adapters::Adaptation;
use crate::conditioning::prompt_schedule::PromptConditioning;
use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::inference::workers::adapters::{Adapters, ReadAdapters, ReadAdaptersTask};
use crate::inference::workers::controlnet::ControlNets;
use crate::inference::workers::guidance::{Guidance, Role};
use crate::layers::Worker;
use crate::model::networks::unet::{ReadText, Unet};

/// SDXL's size conditioning in pixels: original height and width, crop top and left, target height and width. The refiner
/// takes the first four and an aesthetic score.
#[derive(Clone, Debug, PartialEq)]
pub struct TimeIds {
    pub positive: Vec<f64>,
    pub negative: Vec<f64>,
}

/// Prepares a prompt for one UNet.
pub struct Prepare;

pub struct PrepareTask<'a> {
    pub unet: &'a Unet,
    pub controlnets: &'a ControlNets,
    pub adaptation: &'a Adaptation,
    pub conditioning: &'a PromptConditioning,
    pub time_ids: &'a TimeIds,
    pub guidance: &'a Guidance,
    pub placement: &'a Placement,
    /// `B`: images denoised at once, all with this prompt.
    pub batch: usize,
}

/// A prompt as the UNet takes it, for every role that some step needs. The roles of a step are evaluated in one batch.
pub struct PreparedPrompt {
    pub(super) roles: Vec<Role>,
    pub(super) text: ReadText,
    /// One for each ControlNet.
    pub(super) controlnet_texts: Vec<ReadText>,
    pub(super) adapters: Adapters,
    /// The weight of each part.
    pub(super) parts: Vec<f64>,
    /// `[roles·B, P]`
    pub(super) pooled: Tensor,
    /// One row a sample.
    pub(super) time_ids: Vec<Vec<f64>>,
    pub(super) guidance: Guidance,
    pub(super) batch: usize,
}

impl Worker<PrepareTask<'_>> for Prepare {
    type Output = PreparedPrompt;

    fn run(&self, task: PrepareTask<'_>, ctx: &Context) -> Result<PreparedPrompt> {
        let PrepareTask { unet, controlnets, adaptation, conditioning, time_ids, guidance, placement, batch } = task;
        let mut contexts = Vec::new();
        let mut pooled = Vec::new();
        let mut ids = Vec::new();
        let parts: Vec<f64> = conditioning.positive.iter().map(|part| part.weight).collect();
        let roles = guidance.all_roles();
        let mut parts_left = conditioning.positive.iter();
        for role in &roles {
            let (text, sizes) = match role {
                Role::Unseen | Role::Negative => (conditioning.negative.as_ref(), &time_ids.negative),
                Role::Positive => (parts_left.next().map(|part| &part.embeddings), &time_ids.positive),
                Role::Perturbed | Role::Skipping => {
                    (conditioning.positive.first().map(|part| &part.embeddings), &time_ids.positive)
                }
            };
            let text = text.ok_or_else(|| Error::bug(format!("no prompt for {role:?}")))?;
            for _ in 0..batch {
                contexts.push(&text.context);
                pooled.push(&text.pooled);
                ids.push(sizes.clone());
            }
        }
        let compute = placement.compute.tensor();
        let context = Tensor::cat(&contexts, 0)?; // [roles·B, L, D]
        let text = unet.read(&context, compute, &|| ctx.checkpoint())?;
        let negatives = batch * negatives(&roles);
        let task = ReadAdaptersTask { unet, adaptation, text: &text, negatives };
        Ok(PreparedPrompt {
            roles,
            controlnet_texts: controlnets.read(&context, compute, ctx)?,
            adapters: ctx.perform(&ReadAdapters, task)?,
            text,
            parts,
            pooled: Tensor::cat(&pooled, 0)?.to_dtype(compute)?,
            time_ids: ids,
            guidance: guidance.clone(),
            batch,
        })
    }
}

impl PreparedPrompt {
    /// Samples of `roles`, which are neighbours among those prepared.
    pub(super) fn samples(&self, roles: &[Role]) -> Result<Range<usize>> {
        let first = self.roles.windows(roles.len().max(1)).position(|window| window == roles);
        let first = first.ok_or_else(|| Error::bug(format!("roles {roles:?} among {:?}", self.roles)))?;
        Ok(first * self.batch..(first + roles.len()) * self.batch)
    }
}

/// Counts the roles that take the negative prompt.
pub(super) fn negatives(roles: &[Role]) -> usize {
    roles.iter().filter(|role| matches!(role, Role::Unseen | Role::Negative)).count()
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::{Adaptation, ControlNets, Guidance, Prepare, PrepareTask, PreparedPrompt, Tensor, TimeIds};
    use crate::conditioning::prompt_schedule::{PromptConditioning, WeightedEmbeddings};
    use crate::context::Context;
    use crate::device::instructor::Placement;
    use crate::device::interface::{Dtype, Quantization};
    use crate::model::checkpoint::Checkpoint;
    use crate::model::instructor::ModelResources;
    use crate::model::interface::Settings;

    /// A prompt of `parts` parts for the demonstration model.
    fn prompt(scale: f64, batch: usize, parts: usize) -> PreparedPrompt {
        let (ctx, device) = (Context::detached(), candle_core::Device::Cpu);
        let placement = Placement {
            device: device.clone(),
            name: "cpu".to_owned(),
            compute: Dtype::F32,
            vae: Dtype::F32,
            quantization: Quantization::None,
            offloaded: false,
        };
        let checkpoint = Checkpoint::demo().unwrap();
        let unet = ModelResources::new(&Settings::default()).unets.acquire(&checkpoint, &placement, &ctx).unwrap();
        let pooled = checkpoint.text_encoder_2.projection_dim.unwrap();
        let text = |value: f32| crate::conditioning::Embeddings {
            context: Tensor::full(value, (1, 77, checkpoint.unet.context_channels()), &device).unwrap(),
            pooled: Tensor::full(value, (1, pooled), &device).unwrap(),
        };
        let part = |i: usize| WeightedEmbeddings { embeddings: text((1 + i) as f32), weight: 1.0 };
        let conditioning = PromptConditioning { positive: (0..parts).map(part).collect(), negative: Some(text(-1.0)) };
        let time_ids = TimeIds { positive: vec![1.0; 6], negative: vec![-1.0; 6] };
        let task = PrepareTask {
            unet: &unet,
            controlnets: &ControlNets::default(),
            adaptation: &Adaptation::default(),
            conditioning: &conditioning,
            time_ids: &time_ids,
            guidance: &Guidance { parts, ..Guidance::of(scale) },
            placement: &placement,
            batch,
        };
        ctx.perform(&Prepare, task).unwrap()
    }

    /// Samples of one evaluation: -1 for the negative prompt's, 1 for the prompt's, 2 for its second part's.
    fn check((scale, batch, parts): (f64, usize, usize), samples: &[f32]) {
        let PreparedPrompt { text, pooled, time_ids, .. } = prompt(scale, batch, parts);
        assert_eq!((text.samples(), pooled.dtype()), (samples.len(), DType::F32), "scale {scale}, batch {batch}");
        let firsts: Vec<f32> = pooled.to_vec2::<f32>().unwrap().iter().map(|row| row[0]).collect();
        assert_eq!(firsts, samples, "scale {scale}, batch {batch}");
        let ids: Vec<f32> = time_ids.iter().map(|row| row[0] as f32).collect();
        let signs: Vec<f32> = samples.iter().map(|sample| sample.signum()).collect();
        assert_eq!(ids, signs, "scale {scale}, batch {batch}");
    }

    #[test]
    fn guidance_evaluates_both_prompts_in_one_batch() {
        check((5.0, 1, 1), &[-1.0, 1.0]);
        check((5.0, 2, 1), &[-1.0, -1.0, 1.0, 1.0]);
        check((1.0, 1, 1), &[1.0]);
        check((0.0, 3, 1), &[1.0, 1.0, 1.0]);
        check((5.0, 2, 2), &[-1.0, -1.0, 1.0, 1.0, 2.0, 2.0]);
        check((1.0, 1, 2), &[-1.0, 1.0, 2.0]);
    }
}
