//! Guidance with nothing left to decide, and which passes of the network each step needs for it.

use crate::inference::request::guidance::{ScaleMode, ScalingStartpoint, VariabilityMeasure};
use crate::model::networks::interventions::{Change, FreeU};
use crate::scheduler::plan::SamplingPlan;

/// Classifier-free guidance (Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>) and what goes with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Guidance {
    /// 1 and less: no pass for the negative prompt.
    pub scale: f64,
    /// Guidance towards the image of a model that edits it; `None` for others.
    pub image_scale: Option<f64>,
    /// φ of Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, section 3.4.
    pub rescale: f64,
    /// Shares of the steps between which the negative prompt is heeded: Kynkäänniemi et al. 2024,
    /// <https://arxiv.org/abs/2404.07724>. Counted in steps, as diffusers' guiders do.
    pub interval: [f64; 2],
    pub thresholding: Option<Thresholding>,
    pub perturbed_attention: Option<PerturbedAttention>,
    pub skipped_layers: Option<SkippedLayers>,
    pub freeu: Option<FreeU>,
    /// Passes for the prompt: several where `AND` joins parts, which need the negative pass at every step.
    pub parts: usize,
}

/// Dynamic thresholding: brings the guided latents to the extent that they would have at a lower scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholding {
    /// The scale whose extent is wanted.
    pub mimic: Curve,
    /// The guidance scale.
    pub guided: Curve,
    /// Share of the values that set the guided extent.
    pub percentile: f64,
    /// Whether every channel has an extent of its own.
    pub separate: bool,
    pub startpoint: ScalingStartpoint,
    pub measure: VariabilityMeasure,
    /// Share of the thresholded latents.
    pub phi: f64,
}

/// A scale that changes over the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    pub mode: ScaleMode,
    pub scale: f64,
    /// What it goes down to.
    pub least: f64,
    /// Exponent or periods, where the mode has one.
    pub value: f64,
}

impl Curve {
    /// The scale at a share of the steps, 0 at the first, 1 at the last. The curves are those of sd-dynamic-thresholding, its
    /// rounded π included.
    #[must_use]
    #[expect(clippy::approx_constant, reason = "the reference rounds π to five places")]
    pub fn at(self, done: f64) -> f64 {
        const QUARTER: f64 = 1.5707;
        const TURN: f64 = 6.28318;
        let share = match self.mode {
            ScaleMode::Constant => 1.0,
            ScaleMode::LinearDown => 1.0 - done,
            ScaleMode::HalfCosineDown => done.cos(),
            ScaleMode::CosineDown => (done * QUARTER).cos(),
            ScaleMode::LinearUp => done,
            ScaleMode::HalfCosineUp => 1.0 - done.cos(),
            ScaleMode::CosineUp => 1.0 - (done * QUARTER).cos(),
            ScaleMode::PowerUp => done.powf(self.value),
            ScaleMode::PowerDown => 1.0 - done.powf(self.value),
            ScaleMode::LinearRepeating => (0.5 - (done * self.value).fract()).abs() * 2.0,
            ScaleMode::CosineRepeating => (done * TURN * self.value).cos() * 0.5 + 0.5,
            ScaleMode::Sawtooth => (done * self.value).fract(),
        };
        (self.scale - self.least) * share + self.least
    }
}

/// Perturbed-attention guidance: Ahn et al. 2024, <https://arxiv.org/abs/2403.17377>.
#[derive(Clone, Debug, PartialEq)]
pub struct PerturbedAttention {
    pub scale: f64,
    /// By how much `scale` falls with every timestep below 1000.
    pub adaptive_scale: f64,
    /// For each transformer block of the UNet, what is changed.
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
    /// For each transformer block of the UNet, what is changed.
    pub blocks: Vec<Option<Change>>,
}

/// What a pass of the network is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The negative prompt, without the image that the others see.
    Unseen,
    Negative,
    Positive,
    /// The prompt, with perturbed attention.
    Perturbed,
    /// The prompt, with layers skipped.
    Skipping,
}

impl Guidance {
    /// `scale` alone.
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

    /// Whether step `step` of `steps` is guided away from the negative prompt.
    #[must_use]
    pub fn heeds_negative(&self, step: usize, steps: usize) -> bool {
        // Diffusers' guiders cut the products down to whole steps.
        let [start, end] = self.interval.map(|share| (share * steps as f64) as usize);
        self.is_on() && (start..end).contains(&step)
    }

    /// Whether the network is evaluated for the negative prompt too.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.scale > 1.0
    }

    /// The passes of step `step` of `steps`, in the order of their samples in the batch.
    #[must_use]
    pub fn roles(&self, step: usize, steps: usize) -> Vec<Role> {
        let negative = self.heeds_negative(step, steps) || self.parts > 1;
        let skips = self.skipped_layers.as_ref().is_some_and(|skipped| {
            let [start, end] = skipped.interval.map(|share| (share * steps as f64) as usize);
            start < step && step < end
        });
        self.chosen(negative, skips)
    }

    /// Every pass that some step may need; those of a step are neighbours in it.
    #[must_use]
    pub fn all_roles(&self) -> Vec<Role> {
        self.chosen(self.is_on() || self.parts > 1, self.skipped_layers.is_some())
    }

    /// How many passes all steps need together.
    #[must_use]
    pub fn passes(&self, steps: usize) -> usize {
        (0..steps).map(|step| self.roles(step, steps).len()).sum()
    }

    /// How often the network is evaluated for one image's run: every pass counts.
    #[must_use]
    pub fn evaluations(&self, sampling: &SamplingPlan) -> usize {
        let steps = sampling.steps();
        // Steps of two evaluations make both with the passes of the step.
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

    /// For the text in an image's file: what differs from plain guidance, each with a name of its own.
    #[must_use]
    pub fn text(&self) -> Vec<(&'static str, String)> {
        let mut text = Vec::new();
        if let Some(scale) = self.image_scale {
            text.push(("Image CFG scale", scale.to_string()));
        }
        if self.interval != [0.0, 1.0] {
            let [start, end] = self.interval;
            text.push(("CFG interval", format!("{start} - {end}")));
        }
        if let Some(options) = &self.thresholding {
            text.push(("Dynamic thresholding enabled", "True".to_owned()));
            text.push(("Mimic scale", options.mimic.scale.to_string()));
            text.push(("Threshold percentile", (options.percentile * 100.0).to_string()));
        }
        if let Some(pag) = &self.perturbed_attention {
            text.push(("PAG scale", pag.scale.to_string()));
        }
        if let Some(skipped) = &self.skipped_layers {
            text.push(("Skip layer scale", skipped.scale.to_string()));
        }
        if let Some(FreeU { stages: [first, second] }) = &self.freeu {
            let numbers = [first.backbone, second.backbone, first.skip, second.skip].map(|number| number.to_string());
            text.push(("FreeU b1 b2 s1 s2", numbers.join(" ")));
        }
        text
    }

    /// What is changed in the transformer blocks of a pass.
    #[must_use]
    pub fn changes(&self, role: Role) -> Option<&[Option<Change>]> {
        match role {
            Role::Unseen | Role::Negative | Role::Positive => None,
            Role::Perturbed => self.perturbed_attention.as_ref().map(|one| one.blocks.as_slice()),
            Role::Skipping => self.skipped_layers.as_ref().map(|one| one.blocks.as_slice()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many passes each of eight steps has.
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
    fn a_step_has_the_passes_that_its_share_of_the_run_asks_for() {
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
