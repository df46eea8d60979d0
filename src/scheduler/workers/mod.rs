//! Samplers, by name.

use candle_core::Tensor;

use crate::error::Result;
use crate::layers::Worker;
use crate::noise::NoiseSource;
use crate::registry::Registry;
use crate::scheduler::schedule::SamplingPlan;

/// Where a sample stands on the path from noise to image: `x = alpha · x₀ + sigma · ε`.
/// `alpha` is 1 for samplers that work with k-diffusion's σ, and `alpha² + sigma² = 1` for variance-preserving ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    pub alpha: f64,
    pub sigma: f64,
    /// What the network is told: 0 to 999, a real number.
    pub timestep: f64,
}

/// The model as a sampler sees it: the denoised x₀ for `x` at a level. Prediction type, input scaling, guidance and
/// masks are inside. `x` and x₀ are `[B, H, W, C]`, f32. Fails with `cancelled` when the request is.
pub type Denoiser<'a> = dyn FnMut(&Tensor, Level) -> Result<Tensor> + 'a;

/// What a sampler needs for one run.
pub struct SampleTask<'a> {
    pub plan: &'a SamplingPlan,
    /// `[B, H, W, C]`, f32, at the plan's first level: unit noise times `plan.init_scale`.
    pub x: Tensor,
    pub denoiser: &'a mut Denoiser<'a>,
    /// The images' own streams, after the initial noise was drawn from them.
    pub noise: &'a mut NoiseSource,
    /// Told after each step how many are done, and the latest x₀.
    pub observe: &'a mut dyn FnMut(usize, &Tensor) -> Result<()>,
}

/// A sampling algorithm.
pub type Sampler = dyn for<'a> Worker<SampleTask<'a>, Output = Tensor>;

pub static SAMPLERS: Registry<Sampler> = Registry::new("sampler", &[]);
