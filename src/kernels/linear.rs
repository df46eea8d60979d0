//! Linear layers.

use candle_core::{DType, Result, Tensor};

use crate::kernels::epilogue::Epilogue;
use crate::kernels::loader::Loader;
use crate::kernels::shared_layers::LayerWeights;
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::weight::{ResidentWeight, Weight};
use crate::kernels::{cpu, reference, shapes};

/// `y = x · Wᵀ + b` over the last axis.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    outputs: usize,
    inputs: usize,
    /// `[O]`, f32
    bias: Option<Tensor>,
}

impl Linear {
    /// `weight` is `[O, I]`, `bias` `[O]`.
    ///
    /// # Errors
    /// Errors of the cast of the bias to f32.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (size, dtype) = (weight.dims2()?, weight.dtype());
        Self::of(size, Weight::new(&StoredWeight::of(weight)?, dtype, None)?, bias)
    }

    /// Keeps each output's weights as signed bytes and a scale, and quantises each row of its inputs, so that products
    /// are sums of bytes: a quarter of f32's memory, for an error of about a hundredth. On the CPU only.
    /// `weight` is `[O, I]`, `bias` `[O]`.
    ///
    /// # Errors
    /// Errors of the cast of the bias to f32; weights on a GPU.
    pub fn int8(weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::of(weight.dims2()?, Weight::int8(weight)?, bias)
    }

    fn of((outputs, inputs): (usize, usize), weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let bias = bias.map(|b| b.to_dtype(DType::F32)).transpose()?;
        Ok(Self { weight, outputs, inputs, bias })
    }

    /// Reads `weight`, which may be a convolution of one tap, and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(loader: &Loader, inputs: usize, outputs: usize) -> Result<Self> {
        let LayerWeights { weight, bias } = loader.weights(&[outputs, inputs], None, Some(outputs))?;
        Ok(Self { weight, outputs, inputs, bias })
    }

    /// Reads `weight` alone.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load_no_bias(loader: &Loader, inputs: usize, outputs: usize) -> Result<Self> {
        let LayerWeights { weight, bias } = loader.weights(&[outputs, inputs], None, None)?;
        Ok(Self { weight, outputs, inputs, bias })
    }

    /// The layer at `loader`, whose `weight`, `[O, I]`, and `bias` have been read from it.
    ///
    /// # Errors
    /// Errors of the cast of the bias to f32.
    pub fn from_tensors(loader: &Loader, weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let bias = bias.map(|bias| loader.small(bias)).transpose()?;
        Self::of(weight.dims2()?, loader.keep(&StoredWeight::of(weight.clone())?, None)?, bias)
    }

    /// `x` is `[.., I]`; returns `[.., O]` in the dtype of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Epilogue::default())
    }

    /// [`Self::forward`] with a fused epilogue.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward_with(&self, x: &Tensor, epilogue: Epilogue) -> Result<Tensor> {
        let out = shapes::linear(x, (self.outputs, self.inputs), self.bias.as_ref(), epilogue)?;
        if shapes::is_empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.on_device_of(x)? {
            ResidentWeight::Packed(weight) => {
                let bias = self.bias.as_ref();
                cpu::linear(&cpu::LinearTask { x, weight, bias, epilogue, gated: false, out: &out })
            }
            ResidentWeight::Tensor(weight) => reference::linear(x, weight, self.bias.as_ref(), epilogue),
        }
    }

    /// The feed-forward gate of SDXL's transformers: the first half of the outputs times erf-GELU of the second.
    /// `x` is `[.., I]`; returns `[.., O/2]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device errors.
    pub fn forward_geglu(&self, x: &Tensor) -> Result<Tensor> {
        let out = shapes::geglu(x, (self.outputs, self.inputs), self.bias.as_ref())?;
        if shapes::is_empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.on_device_of(x)? {
            ResidentWeight::Packed(weight) => {
                let (bias, epilogue) = (self.bias.as_ref(), Epilogue::default());
                cpu::linear(&cpu::LinearTask { x, weight, bias, epilogue, gated: true, out: &out })
            }
            ResidentWeight::Tensor(weight) => {
                reference::geglu(&reference::linear(x, weight, self.bias.as_ref(), Epilogue::default())?)
            }
        }
    }
}
