//! Seeded Gaussian noise.

/// One stream of noise per image.
pub struct NoiseSource {}
