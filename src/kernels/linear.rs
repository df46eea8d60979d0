//! Linear layers.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::kernels::epilogue::Epilogue;
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::weight::Weight;
use crate::kernels::{cpu, offload, reference, shapes, shared_layers};

/// `y = x · Wᵀ + b` over the last axis.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(crate) weight: Weight,
    outputs: usize,
    inputs: usize,
    /// `[O]`, f32
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    /// `weight` is `[O, I]`, `bias` `[O]`.
    ///
    /// # Errors
    /// Those of the cast of the bias to f32.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (size, dtype) = (weight.dims2()?, weight.dtype());
        Self::of(size, Weight::new(&StoredWeight::of(weight)?, dtype, None)?, bias)
    }

    /// Keeps each output's weights as signed bytes and a scale, and makes bytes of each row of its inputs, so that
    /// products are sums of bytes: a quarter of f32's memory, for an error of about a hundredth. On the CPU only.
    /// `weight` is `[O, I]`, `bias` `[O]`.
    ///
    /// # Errors
    /// Those of the cast of the bias to f32; weights on a GPU.
    pub fn int8(weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::of(weight.dims2()?, Weight::int8(weight)?, bias)
    }

    fn of((outputs, inputs): (usize, usize), weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let bias = bias.map(|b| offload::brought(b.to_dtype(DType::F32)?)).transpose()?;
        Ok(Self { weight, outputs, inputs, bias })
    }

    /// Reads `weight`, which may be that of a convolution of one tap, and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(vb: &VarBuilder, inputs: usize, outputs: usize) -> Result<Self> {
        shared_layers::layer(vb, || {
            let weight = Weight::load(&StoredWeight::matrix(vb, outputs, inputs)?, vb, None)?;
            Self::of((outputs, inputs), weight, Some(vb.get(outputs, "bias")?))
        })
    }

    /// Reads `weight` alone.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load_no_bias(vb: &VarBuilder, inputs: usize, outputs: usize) -> Result<Self> {
        shared_layers::layer(vb, || {
            let weight = Weight::load(&StoredWeight::matrix(vb, outputs, inputs)?, vb, None)?;
            Self::of((outputs, inputs), weight, None)
        })
    }

    /// The layer `vb`, whose `weight`, `[O, I]`, and `bias` have been read from it.
    ///
    /// # Errors
    /// Those of the cast of the bias to f32.
    pub fn named(vb: &VarBuilder, weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::of(weight.dims2()?, Weight::load(&StoredWeight::of(weight.clone())?, vb, None)?, bias)
    }

    /// `x` is `[.., I]`; gives `[.., O]` in the dtype of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Epilogue::default())
    }

    /// [`Self::forward`] with what follows it fused.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_with(&self, x: &Tensor, epilogue: Epilogue) -> Result<Tensor> {
        let out = shapes::linear(x, (self.outputs, self.inputs), self.bias.as_ref(), epilogue)?;
        if shapes::is_empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.beside(x)? {
            Weight::Packed(weight) => cpu::linear(x, weight, self.bias.as_ref(), epilogue, (&out, false)),
            Weight::Tensor(weight) => reference::linear(x, weight, self.bias.as_ref(), epilogue),
            Weight::Away(_) => offload::still(),
        }
    }

    /// The feed-forward gate of SDXL's transformers: the first half of the outputs times erf-GELU of the second.
    /// `x` is `[.., I]`; gives `[.., O/2]`.
    ///
    /// # Errors
    /// Shapes that do not fit, or the device's own.
    pub fn forward_geglu(&self, x: &Tensor) -> Result<Tensor> {
        let out = shapes::geglu(x, (self.outputs, self.inputs), self.bias.as_ref())?;
        if shapes::is_empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.beside(x)? {
            Weight::Packed(weight) => cpu::linear(x, weight, self.bias.as_ref(), Epilogue::default(), (&out, true)),
            Weight::Tensor(weight) => {
                reference::geglu(&reference::linear(x, weight, self.bias.as_ref(), Epilogue::default())?)
            }
            Weight::Away(_) => offload::still(),
        }
    }
}
