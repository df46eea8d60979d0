//! Pictures in memory, at another size, and as requests bring them.

pub mod pixels;
pub mod resample;
pub mod source;
