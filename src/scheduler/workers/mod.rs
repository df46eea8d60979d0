//! Samplers and schedules by name.

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

use crate::registry::Registry;
use crate::scheduler::sampler::Sampler;

pub use spacing::SPACINGS;

pub static SAMPLERS: Registry<dyn Sampler> = Registry::new(
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
