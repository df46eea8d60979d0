//! Images in memory, resampled, and as request inputs.

pub mod pixels;
pub mod resample;
pub mod source;
