//! The contract of a sampler: what the planner must know of it, and the model that it calls.
//!
//! A sampler is one file in `workers/` and one line in [`crate::scheduler::workers::SAMPLERS`].

use candle_core::Tensor;

use crate::context::Context;
use crate::error::{Error, Result, StageContext};
use crate::noise::NoiseSource;
use crate::scheduler::plan::{Calls, Level, SamplingPlan};

/// A sampling algorithm.
pub trait Sampler: Send + Sync {
    fn profile(&self) -> &'static Profile;

    /// Denoises `x` along the plan's run. `x` is `[B, H, W, C]`, f32, at the plan's first level: unit noise times
    /// `plan.init_scale`, or a noised image. The result stands at the last step's `to`.
    ///
    /// # Errors
    /// Those of [`Model`].
    fn sample(&self, plan: &SamplingPlan, x: Tensor, model: &mut Model<'_>) -> Result<Tensor>;
}

/// Predicts x₀ of `x` at a level; both are `[B, H, W, C]`, f32. Input scaling, prediction type and guidance are inside.
pub type Denoiser<'a> = dyn FnMut(&Tensor, Level) -> Result<Tensor> + 'a;

/// Receives the number of completed steps, the sample and the latest x₀ after each step; returns the sample from which
/// the next step continues.
pub type OnStep<'a> = dyn FnMut(usize, Tensor, &Tensor) -> Result<Tensor> + 'a;

/// The model as a sampler sees it: x₀ predictions, a hook after each step, and the images' noise.
pub struct Model<'a> {
    denoiser: &'a mut Denoiser<'a>,
    on_step: &'a mut OnStep<'a>,
    noise: &'a mut NoiseSource,
    ctx: &'a Context,
    completed_steps: usize,
}

impl<'a> Model<'a> {
    /// `noise` holds the images' own streams, from which the initial noise is already drawn.
    #[must_use]
    pub fn new(
        denoiser: &'a mut Denoiser<'a>,
        on_step: &'a mut OnStep<'a>,
        noise: &'a mut NoiseSource,
        ctx: &'a Context,
    ) -> Self {
        Self { denoiser, on_step, noise, ctx, completed_steps: 0 }
    }

    /// The denoised `x`: one evaluation of the model.
    ///
    /// # Errors
    /// `cancelled`, `deadline_exceeded`, and those of the model.
    pub fn x0(&mut self, x: &Tensor, level: Level) -> Result<Tensor> {
        self.ctx.checkpoint()?;
        (self.denoiser)(x, level)
    }

    /// Completes a step that ends at `x` with the latest `x0`; returns the sample for the next step, in which the
    /// caller may have restored masked regions.
    ///
    /// # Errors
    /// Those of the caller's hook.
    pub fn step(&mut self, x: Tensor, x0: &Tensor) -> Result<Tensor> {
        self.completed_steps += 1;
        (self.on_step)(self.completed_steps, x, x0)
    }

    /// Fresh unit noise for every image.
    ///
    /// # Errors
    /// Those of [`NoiseSource::draw`].
    pub fn noise(&mut self) -> Result<Tensor> {
        self.noise.draw()
    }
}

/// Properties of a sampler on which its plan depends.
pub struct Profile {
    /// The usual name: AUTOMATIC1111's if it has one.
    pub label: &'static str,
    /// One sentence for `scheduler.list`.
    pub about: &'static str,
    /// Other names, including diffusers' classes.
    pub aliases: &'static [&'static str],
    pub grid: Grid,
    pub midpoint: Midpoint,
    pub end: End,
    pub calls: Calls,
    /// Default η; `None` for samplers without η.
    pub eta: Option<f64>,
}

/// The parameterization of noisy samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameterization {
    /// `x = α·x₀ + σ·ε` with α² + σ² = 1, as in diffusers' DDIM.
    VariancePreserving,
    /// `x = x₀ + σ·ε`, as in k-diffusion.
    VarianceExploding,
}

/// How a sampler's timesteps are chosen; diffusers' scheduler classes differ in this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// n integer timesteps.
    Discrete,
    /// n of the integer timesteps that a model was distilled for.
    Distilled,
    /// n of n + 1 integer timesteps, so that the last is above 0.
    Padded,
    /// n real timesteps.
    Continuous,
    /// n real timesteps, but those of Karras σ are rounded.
    ContinuousRounded,
}

impl Grid {
    #[must_use]
    pub fn parameterization(self) -> Parameterization {
        match self {
            Self::Discrete | Self::Distilled | Self::Padded => Parameterization::VariancePreserving,
            Self::Continuous | Self::ContinuousRounded => Parameterization::VarianceExploding,
        }
    }
}

/// The level of a step's second model call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Midpoint {
    /// The end of the step; also for samplers without a second call.
    Endpoint,
    /// The geometric mean of the step's two σ.
    Geometric,
    /// The geometric mean of σ and the σ that an ancestral step goes down to.
    Ancestral,
    /// The second timestep plus one stride, from which PNDM corrects its first step.
    PndmWarmup,
    /// The timestep that TCD denoises to before it adds noise.
    BeforeRenoising,
}

/// The level at which the last step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The clean image: σ = 0.
    Image,
    /// The checkpoint's `final_sigmas_type`.
    Checkpoint,
    /// The lowest σ.
    SigmaMin,
    /// The first ᾱ, or the clean image if the checkpoint has `set_alpha_to_one`. Steps descend by a constant stride.
    FirstAlpha,
    /// The first timestep.
    FirstTimestep,
}

/// σ of an ancestral step: denoise down to `down`, then add noise of `up` to reach `to`. `eta` is 0 to 1.
/// `down² + up² = to²` (Karras et al. 2022; k-diffusion's `get_ancestral_step`).
pub(crate) fn ancestral(from: f64, to: f64, eta: f64) -> (f64, f64) {
    let up = (eta * (to * to * (from * from - to * to) / (from * from)).sqrt()).min(to);
    ((to * to - up * up).sqrt(), up)
}

/// The weighted sum of tensors of one shape.
pub(crate) fn blend(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for &(factor, tensor) in terms.iter().filter(|(factor, _)| *factor != 0.0) {
        let term = tensor.affine(factor, 0.0).stage("sampling")?;
        sum = Some(match sum {
            Some(sum) => (sum + term).stage("sampling")?,
            None => term,
        });
    }
    match (sum, terms.first()) {
        (Some(sum), _) => Ok(sum),
        (None, Some((_, tensor))) => tensor.zeros_like().stage("sampling"),
        (None, None) => Err(Error::bug("a blend of no terms")),
    }
}
