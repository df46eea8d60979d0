//! Training variants and distillations, recognised by marker tensors or by words in the metadata.

use crate::registry::Registry;
use crate::scheduler::config::{Prediction, SchedulerConfig, TimestepSpacing};

/// One variant.
#[derive(Debug)]
pub struct TrainingVariant {
    pub name: &'static str,
    /// Marker tensors; all must be present.
    marks: &'static [&'static str],
    /// Words of which one is in the metadata's title or architecture.
    words: &'static [&'static str],
    prediction: Prediction,
    spacing: Option<TimestepSpacing>,
    edm: Option<EdmNoise>,
    /// Its `scaling_factor` of latents, if it is not SDXL's.
    pub scaling_factor: Option<f64>,
}

/// The noise parameters of Karras et al. 2022, <https://arxiv.org/abs/2206.00364>, table 1.
#[derive(Clone, Copy, Debug)]
struct EdmNoise {
    class_name: &'static str,
    sigma_data: f64,
    sigma_min: f64,
    sigma_max: f64,
    schedule: &'static str,
}

const PLAIN: TrainingVariant = TrainingVariant {
    name: "",
    marks: &[],
    words: &[],
    prediction: Prediction::Epsilon,
    spacing: None,
    edm: None,
    scaling_factor: None,
};
/// Distilled networks start at the noisiest timestep.
const DISTILLED: TrainingVariant = TrainingVariant { spacing: Some(TimestepSpacing::Trailing), ..PLAIN };

const PLAYGROUND: TrainingVariant = TrainingVariant {
    name: "playground_v2_5",
    marks: &["edm_mean", "edm_std"],
    edm: Some(EdmNoise {
        class_name: "EDMDPMSolverMultistepScheduler",
        sigma_data: 0.5,
        sigma_min: 0.002,
        sigma_max: 80.0,
        schedule: "karras",
    }),
    scaling_factor: Some(0.5),
    ..PLAIN
};
const COSXL: TrainingVariant = TrainingVariant {
    name: "cosxl",
    marks: &["edm_vpred.sigma_max"],
    prediction: Prediction::VPrediction,
    edm: Some(EdmNoise {
        class_name: "EDMEulerScheduler",
        sigma_data: 1.0,
        sigma_min: 0.002,
        sigma_max: 120.0,
        schedule: "exponential",
    }),
    ..PLAIN
};
const V_PREDICTION: TrainingVariant =
    TrainingVariant { name: "v_prediction", marks: &["v_pred"], prediction: Prediction::VPrediction, ..PLAIN };
const TURBO: TrainingVariant = TrainingVariant { name: "turbo", words: &["turbo"], ..DISTILLED };
const LIGHTNING: TrainingVariant = TrainingVariant { name: "lightning", words: &["lightning"], ..DISTILLED };
const HYPER: TrainingVariant =
    TrainingVariant { name: "hyper", words: &["hyper-sd", "hypersd", "hyper sd"], ..DISTILLED };
const DMD2: TrainingVariant = TrainingVariant { name: "dmd2", words: &["dmd2"], ..DISTILLED };

pub static VARIANTS: Registry<TrainingVariant> = Registry::new(
    "model variant",
    &[
        ("playground_v2_5", &PLAYGROUND),
        ("cosxl", &COSXL),
        ("v_prediction", &V_PREDICTION),
        ("turbo", &TURBO),
        ("lightning", &LIGHTNING),
        ("hyper", &HYPER),
        ("dmd2", &DMD2),
    ],
);

impl TrainingVariant {
    /// The variant with these marker tensors.
    #[must_use]
    pub fn from_tensors(has: impl Fn(&str) -> bool) -> Option<&'static Self> {
        let marked = |variant: &&Self| !variant.marks.is_empty() && variant.marks.iter().all(|mark| has(mark));
        VARIANTS.iter().map(|(_, variant)| variant).find(marked)
    }

    /// The variant that a title or an architecture names.
    #[must_use]
    pub fn from_title(text: &str) -> Option<&'static Self> {
        let text = text.to_lowercase();
        VARIANTS.iter().map(|(_, variant)| variant).find(|variant| variant.words.iter().any(|word| text.contains(word)))
    }

    /// The variant that a scheduler configuration implies.
    #[must_use]
    pub fn from_scheduler(scheduler: &SchedulerConfig) -> Option<&'static Self> {
        match (scheduler.is_edm(), scheduler.prediction_type) {
            (true, Prediction::Epsilon) => Some(&PLAYGROUND),
            (true, Prediction::VPrediction) => Some(&COSXL),
            (false, Prediction::VPrediction) => Some(&V_PREDICTION),
            (_, Prediction::Epsilon | Prediction::Sample) => None,
        }
    }

    /// The scheduler of a checkpoint without a scheduler configuration.
    #[must_use]
    pub fn scheduler(variant: Option<&Self>) -> SchedulerConfig {
        let sdxl = SchedulerConfig::sdxl();
        let Some(variant) = variant else { return sdxl };
        let plain = SchedulerConfig {
            prediction_type: variant.prediction,
            timestep_spacing: variant.spacing.or(sdxl.timestep_spacing),
            ..sdxl
        };
        let Some(EdmNoise { class_name, sigma_data, sigma_min, sigma_max, schedule }) = variant.edm else {
            return plain;
        };
        SchedulerConfig {
            class_name: Some(class_name.to_owned()),
            sigma_data: Some(sigma_data),
            sigma_min: Some(sigma_min),
            sigma_max: Some(sigma_max),
            sigma_schedule: Some(schedule.to_owned()),
            timestep_spacing: None,
            ..plain
        }
    }
}
