//! Seeded Gaussian noise.

/// One stream of noise per image.
pub struct NoiseSource {}

/// Whose random numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RngKind {
    #[default]
    Cpu,
    Nv,
}
