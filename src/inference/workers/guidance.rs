//! Classifier-free guidance (Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>) and its rescaling (Lin et al. 2023,
//! <https://arxiv.org/abs/2305.08891>, equations 15 and 16); guidance away from perturbed passes (Ahn et al. 2024,
//! <https://arxiv.org/abs/2403.17377>, equation 16).

use candle_core::{DType, Device, Tensor};

use crate::context::Context;
use crate::error::Result;
use crate::inference::workers::thresholding::{ThresholdGuidance, ThresholdTask, Thresholding};
use crate::layers::Worker;
use crate::model::networks::interventions::{Change, FreeU};
use crate::scheduler::plan::SamplingPlan;

/// Guidance with nothing left to decide.
#[derive(Clone, Debug, PartialEq)]
pub struct Guidance {
    /// Scale of classifier-free guidance; at 1 and less the negative prompt is not evaluated.
    pub scale: f64,
    /// Image guidance of instruct-pix2pix models; `None` for others.
    pub image_scale: Option<f64>,
    /// φ of Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, section 3.4.
    pub rescale: f64,
    /// Shares of the steps between which the guidance scale applies: Kynkäänniemi et al. 2024,
    /// <https://arxiv.org/abs/2404.07724>. Counted in steps, as diffusers' guiders do.
    pub interval: [f64; 2],
    pub thresholding: Option<Thresholding>,
    pub perturbed_attention: Option<PerturbedAttention>,
    pub skipped_layers: Option<SkippedLayers>,
    pub freeu: Option<FreeU>,
    /// Parts of the prompt that `AND` joins; several need the negative prompt at every step.
    pub parts: usize,
}

/// Perturbed-attention guidance: Ahn et al. 2024, <https://arxiv.org/abs/2403.17377>.
#[derive(Clone, Debug, PartialEq)]
pub struct PerturbedAttention {
    pub scale: f64,
    /// Amount by which `scale` falls with every timestep below 1000.
    pub adaptive_scale: f64,
    /// The change to each transformer block of the UNet.
    pub blocks: Vec<Option<Change>>,
}

impl PerturbedAttention {
    /// The scale at a timestep.
    #[must_use]
    pub fn scale_at(&self, timestep: f64) -> f64 {
        if self.adaptive_scale > 0.0 {
            (self.scale - self.adaptive_scale * (1000.0 - timestep)).max(0.0)
        } else {
            self.scale
        }
    }
}

/// Guidance away from a network without some of its layers.
#[derive(Clone, Debug, PartialEq)]
pub struct SkippedLayers {
    pub scale: f64,
    /// Shares of the steps. The step at the first one is not guided.
    pub interval: [f64; 2],
    /// The change to each transformer block of the UNet.
    pub blocks: Vec<Option<Change>>,
}

/// The purpose of one sample in an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The negative prompt, without the image of instruct-pix2pix.
    Unseen,
    Negative,
    Positive,
    /// The prompt, with perturbed attention.
    Perturbed,
    /// The prompt, with layers skipped.
    Skipping,
}

impl Guidance {
    /// Classifier-free guidance at `scale`, and nothing else.
    #[must_use]
    pub fn of(scale: f64) -> Self {
        Self {
            scale,
            image_scale: None,
            rescale: 0.0,
            interval: [0.0, 1.0],
            thresholding: None,
            perturbed_attention: None,
            skipped_layers: None,
            freeu: None,
            parts: 1,
        }
    }

    /// True if step `step` of `steps` is guided away from the negative prompt.
    #[must_use]
    pub fn uses_negative(&self, step: usize, steps: usize) -> bool {
        // Diffusers' guiders cut the products down to whole steps.
        let [start, end] = self.interval.map(|share| (share * steps as f64) as usize);
        self.is_on() && (start..end).contains(&step)
    }

    /// True if guidance needs the negative prompt.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.scale > 1.0
    }

    /// The roles of step `step` of `steps`, in the order of their samples in the batch.
    #[must_use]
    pub fn roles(&self, step: usize, steps: usize) -> Vec<Role> {
        let negative = self.uses_negative(step, steps) || self.parts > 1;
        let skips = self.skipped_layers.as_ref().is_some_and(|skipped| {
            let [start, end] = skipped.interval.map(|share| (share * steps as f64) as usize);
            start < step && step < end
        });
        self.chosen(negative, skips)
    }

    /// Every role that some step may need; those of a step are neighbours in it.
    #[must_use]
    pub fn all_roles(&self) -> Vec<Role> {
        self.chosen(self.is_on() || self.parts > 1, self.skipped_layers.is_some())
    }

    /// Counts the roles of all steps.
    #[must_use]
    pub fn passes(&self, steps: usize) -> usize {
        (0..steps).map(|step| self.roles(step, steps).len()).sum()
    }

    /// Evaluations of the network for one pass over the schedule, counted per role.
    #[must_use]
    pub fn evaluations(&self, sampling: &SamplingPlan) -> usize {
        let steps = sampling.steps();
        // Both evaluations of a step have the roles of the step.
        (sampling.evaluations() * self.passes(steps)).div_ceil(steps.max(1))
    }

    fn chosen(&self, negative: bool, skips: bool) -> Vec<Role> {
        let all = [
            (Role::Unseen, usize::from(negative && self.image_scale.is_some())),
            (Role::Negative, usize::from(negative)),
            (Role::Positive, self.parts),
            (Role::Perturbed, usize::from(self.perturbed_attention.is_some())),
            (Role::Skipping, usize::from(skips)),
        ];
        all.into_iter().flat_map(|(role, count)| std::iter::repeat_n(role, count)).collect()
    }

    /// Changes to the UNet's transformer blocks for a role.
    #[must_use]
    pub fn changes(&self, role: Role) -> Option<&[Option<Change>]> {
        match role {
            Role::Unseen | Role::Negative | Role::Positive => None,
            Role::Perturbed => self.perturbed_attention.as_ref().map(|one| one.blocks.as_slice()),
            Role::Skipping => self.skipped_layers.as_ref().map(|one| one.blocks.as_slice()),
        }
    }
}

/// Combines the predictions of an evaluation's roles.
pub struct ApplyGuidance;

/// Predictions are `[B, H, W, C]`, f32, all of one kind; with dynamic thresholding they are x₀.
pub struct GuidanceTask<'a> {
    /// For the negative prompt without the image, of instruct-pix2pix models.
    pub unseen: Option<Tensor>,
    /// For the negative prompt, if it guides this step.
    pub negative: Option<Tensor>,
    /// For the prompt.
    pub positive: Tensor,
    /// For the prompt, with perturbed attention.
    pub perturbed: Option<Tensor>,
    /// For the prompt, with layers skipped.
    pub skipping: Option<Tensor>,
    pub guidance: &'a Guidance,
    pub timestep: f64,
    /// 0 at the first step, 1 at the last.
    pub progress: f64,
}

impl Worker<GuidanceTask<'_>> for ApplyGuidance {
    /// `[B, H, W, C]`, f32.
    type Output = Tensor;

    fn run(&self, task: GuidanceTask<'_>, ctx: &Context) -> Result<Tensor> {
        let GuidanceTask { unseen, negative, positive, perturbed, skipping, guidance, timestep, progress } = task;
        let skipped = guidance.skipped_layers.as_ref().map_or(0.0, |skipped| skipped.scale);
        let mut guided = match (&negative, &skipping, &guidance.thresholding) {
            (Some(negative), _, Some(options)) => {
                ctx.perform(&ThresholdGuidance, ThresholdTask { negative, positive: &positive, progress, options })?
            }
            (Some(negative), _, None) => extrapolate(negative, &positive, guidance.scale)?,
            // Diffusers' guider starts at the worse prediction where there is no other.
            (None, Some(skipping), _) => extrapolate(skipping, &positive, skipped)?,
            (None, None, _) => positive.clone(),
        };
        // u + s (p − n) + i (n − u), Brooks et al. 2022, equation 3, less what is in `guided` already.
        if let (Some(negative), Some(unseen), Some(scale)) = (&negative, &unseen, guidance.image_scale) {
            guided = (guided + ((negative - unseen)? * (scale - 1.0))?)?;
        }
        if let (Some(_), Some(skipping)) = (&negative, &skipping) {
            guided = (guided + ((&positive - skipping)? * skipped)?)?;
        }
        if let (Some(perturbed), Some(options)) = (&perturbed, &guidance.perturbed_attention) {
            guided = (guided + ((&positive - perturbed)? * options.scale_at(timestep))?)?;
        }
        if guidance.rescale == 0.0 || (negative.is_none() && skipping.is_none()) {
            return Ok(guided);
        }
        let ratio = (deviation(&positive)? / deviation(&guided)?)?; // [B, 1, 1, 1]
        let rescaled = guided.broadcast_mul(&ratio)?;
        Ok(((rescaled * guidance.rescale)? + (guided * (1.0 - guidance.rescale))?)?)
    }
}

/// Extrapolates from one prediction through another, `scale` times as far.
fn extrapolate(start: &Tensor, through: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((start + ((through - start)? * scale)?)?)
}

/// Standard deviation of each sample, with Bessel's correction as torch has it: `[B, 1, 1, 1]`, f32.
fn deviation(x: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    // On the host: Metal has no f64.
    let flat = x.to_device(&Device::Cpu)?.reshape((batch, height * width * channels))?.to_dtype(DType::F64)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let count = (height * width * channels).saturating_sub(1).max(1) as f64;
    let variance = (centred.sqr()?.sum_keepdim(1)? / count)?;
    Ok(variance.sqrt()?.to_dtype(DType::F32)?.reshape((batch, 1, 1, 1))?.to_device(x.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the roles of each of eight steps.
    fn check(guidance: &Guidance, expected: [usize; 8]) {
        let passes: Vec<usize> = (0..8).map(|step| guidance.roles(step, 8).len()).collect();
        assert_eq!(passes, expected, "{guidance:?}");
        assert_eq!(guidance.passes(8), expected.iter().sum::<usize>());
        let all = guidance.all_roles();
        for step in 0..8 {
            let roles = guidance.roles(step, 8);
            assert!(all.windows(roles.len()).any(|window| window == roles), "{roles:?} in {all:?}");
        }
    }

    #[test]
    fn roles_follow_the_intervals_of_guidance() {
        let blocks = || vec![Some(Change::Skipped)];
        let cut = Guidance { interval: [0.2, 0.8], ..Guidance::of(5.0) };
        check(&Guidance::of(1.0), [1; 8]);
        check(&Guidance::of(5.0), [2; 8]);
        check(&cut, [1, 2, 2, 2, 2, 2, 1, 1]);
        check(&Guidance { interval: [0.5, 0.5], ..Guidance::of(5.0) }, [1; 8]);
        let skipped_layers = Some(SkippedLayers { scale: 1.0, interval: [0.0, 0.5], blocks: blocks() });
        check(&Guidance { skipped_layers: skipped_layers.clone(), ..cut.clone() }, [1, 3, 3, 3, 2, 2, 1, 1]);
        let perturbed_attention = Some(PerturbedAttention { scale: 1.0, adaptive_scale: 0.0, blocks: blocks() });
        check(&Guidance { skipped_layers, perturbed_attention, ..cut }, [2, 4, 4, 4, 3, 3, 2, 2]);
    }
}
