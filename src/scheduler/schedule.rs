//! Sigma tables.

/// Everything a sampler needs to know, decided.
pub struct SamplingPlan {}
