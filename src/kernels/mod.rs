//! The compute seam: linear, convolution, attention, norms. Networks are written against this module, never against a
//! device. A kernel picks its implementation by device and dtype; [`mod@reference`] runs everywhere, and every other
//! implementation is tested against it.
//!
//! Layout: feature maps are `[B, H, W, C]`, tokens `[B, L, C]`. Weights may be kept in a narrower dtype than the
//! activations (f32 activations with f16 or bf16 weights), in eight-bit floats or in blocks of still fewer bits: on the CPU
//! each weight is widened exactly where it is used, and rounded there to the dtype in which the network computes.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `L` tokens, `O` output channels, `K` kernel side.

pub(crate) mod block_format;
pub(crate) mod conv2d;
pub(crate) mod conv_shape;
pub(crate) mod cpu;
pub(crate) mod dequantize;
pub(crate) mod epilogue;
pub(crate) mod linear;
pub(crate) mod loader;
pub(crate) mod mask;
pub(crate) mod norm;
pub(crate) mod ops;
pub mod reference;
pub(crate) mod running_stats;
pub(crate) mod shapes;
pub(crate) mod shared_layers;
pub(crate) mod stored_weight;
pub(crate) mod weight;

pub use block_format::Coding;
pub use conv_shape::{ConvShape, Padding};
pub use conv2d::Conv2d;
#[cfg(target_arch = "x86_64")]
#[doc(hidden)]
pub use cpu::amx_probe;
pub use cpu::simd;
pub use epilogue::{Activation, Epilogue};
pub use linear::Linear;
pub use loader::{Int8Rule, LoadPolicy, LoadStats, Loader, WeightSource};
pub use mask::Mask;
pub use norm::{GroupNorm, LayerNorm, Statistics};
pub use ops::{attention, concat_channels, upsample_nearest};
pub use shared_layers::{Layers, SharedLayer};
pub use stored_weight::StoredWeight;
pub use weight::{bytes_held, stays_as_stored};
