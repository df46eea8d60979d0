//! Samplers and schedules, by name.

pub(crate) mod ddim;
pub(crate) mod ddpm;
pub(crate) mod deis;
pub(crate) mod dpmpp_2m;
pub(crate) mod dpmpp_2m_sde;
pub(crate) mod dpmpp_2s;
pub(crate) mod dpmpp_2s_ancestral;
pub(crate) mod euler;
pub(crate) mod euler_ancestral;
pub(crate) mod heun;
pub(crate) mod kdpm2;
pub(crate) mod kdpm2_ancestral;
pub(crate) mod lcm;
pub(crate) mod lms;
pub(crate) mod pndm;
pub(crate) mod spacing;
pub(crate) mod tcd;
pub(crate) mod unipc;

use candle_core::Tensor;

use crate::error::{Result, Stage};
use crate::layers::Worker;
use crate::noise::NoiseSource;
use crate::registry::Registry;
use crate::scheduler::schedule::{Calls, SamplingPlan};

pub use crate::scheduler::schedule::Level;
pub use spacing::SPACINGS;

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
    /// Told after each step how many are done, the sample there and the latest x₀; gives the sample to go on from.
    pub land: &'a mut dyn FnMut(usize, Tensor, &Tensor) -> Result<Tensor>,
}

/// A sampling algorithm and what a plan must know of it.
pub trait Algorithm: for<'a> Worker<SampleTask<'a>, Output = Tensor> {
    fn profile(&self) -> &'static Profile;
}

pub type Sampler = dyn Algorithm;

pub static SAMPLERS: Registry<Sampler> = Registry::new(
    "sampler",
    &[
        ("ddim", &ddim::Ddim),
        ("ddpm", &ddpm::Ddpm),
        ("euler", &euler::Euler),
        ("euler_ancestral", &euler_ancestral::EulerAncestral),
        ("heun", &heun::Heun),
        ("lms", &lms::Lms),
        ("dpmpp_2m", &dpmpp_2m::Dpmpp2m),
        ("dpmpp_2m_sde", &dpmpp_2m_sde::Dpmpp2mSde),
        ("dpmpp_2s", &dpmpp_2s::Dpmpp2s),
        ("dpmpp_2s_ancestral", &dpmpp_2s_ancestral::Dpmpp2sAncestral),
        ("kdpm2", &kdpm2::Kdpm2),
        ("kdpm2_ancestral", &kdpm2_ancestral::Kdpm2Ancestral),
        ("unipc", &unipc::Unipc),
        ("deis", &deis::Deis),
        ("pndm", &pndm::Pndm),
        ("lcm", &lcm::Lcm),
        ("tcd", &tcd::Tcd),
    ],
);

/// What a plan must know of a sampler.
pub struct Profile {
    /// The name people know, AUTOMATIC1111's where it has one.
    pub label: &'static str,
    /// One sentence for `scheduler.list`.
    pub about: &'static str,
    /// Other names, also diffusers' classes.
    pub aliases: &'static [&'static str],
    pub grid: Grid,
    pub middle: Middle,
    pub end: End,
    pub calls: Calls,
    /// The default η of samplers that have one.
    pub eta: Option<f64>,
}

/// The coordinates of a sampler, and how its timesteps are chosen; the reference's scheduler classes differ in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// Variance preserving, n whole timesteps.
    Whole,
    /// Variance preserving, whole timesteps among those that a model was distilled for.
    Distilled,
    /// k-diffusion's x = x₀ + σ·ε, n real timesteps.
    Real,
    /// Real, but Karras timesteps are rounded.
    RealRounded,
    /// Variance preserving, n of n + 1 whole timesteps, so that the last lies above 0.
    Padded,
}

/// Where a step's second model call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Middle {
    /// Where the step lands, or nowhere.
    Landing,
    /// At the geometric mean of the σ on both sides.
    Geometric,
    /// At the geometric mean of σ and the σ that an ancestral step goes down to.
    Ancestral,
    /// The second timestep raised by one stride: whence PNDM corrects its first step.
    Raised,
    /// At the timestep that TCD denoises to before it adds noise.
    Noised,
}

/// Where the last step lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At the image: σ = 0.
    Image,
    /// Where the checkpoint's `final_sigmas_type` says.
    Checkpoint,
    /// At the lowest σ.
    SigmaMin,
    /// At the first ᾱ, or at the image if the checkpoint has `set_alpha_to_one`. Steps descend by a constant stride.
    FirstAlpha,
    /// At the first timestep.
    FirstTimestep,
}

/// σ of an ancestral step: how far to go down, and how much noise lifts it to `to` again. `eta` is 0 to 1.
/// `down² + up² = to²` (Karras et al. 2022; k-diffusion's `get_ancestral_step`).
pub(crate) fn ancestral(from: f64, to: f64, eta: f64) -> (f64, f64) {
    let up = (eta * (to * to * (from * from - to * to) / (from * from)).sqrt()).min(to);
    ((to * to - up * up).sqrt(), up)
}

/// The sum of tensors of one shape, each times its number.
fn blend(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
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
        (None, None) => Err(crate::error::Error::bug("a blend of nothing")),
    }
}
