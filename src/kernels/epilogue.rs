//! Operations that a linear layer or a convolution applies to its result before it is written.

use candle_core::Tensor;

/// Operations fused with a linear layer or convolution, applied in this order:
/// bias, `per_sample`, `activation`, `residual`.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// `[B, O]`, added to every position of its sample: the time embedding.
    pub per_sample: Option<&'a Tensor>,
    pub activation: Option<Activation>,
    /// Of the result's shape.
    pub residual: Option<&'a Tensor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// `x · Φ(x)`, by erf
    Gelu,
    /// `x · sigmoid(1.702 x)`, as in CLIP ViT-L
    QuickGelu,
}
