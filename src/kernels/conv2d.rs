//! Convolutions over feature maps.

use candle_core::{DType, Result, Tensor};

use crate::kernels::conv_shape::ConvShape;
use crate::kernels::epilogue::Epilogue;
use crate::kernels::loader::Loader;
use crate::kernels::shared_layers::LayerWeights;
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::weight::{ResidentWeight, Weight};
use crate::kernels::{cpu, reference, shapes};

/// A convolution over `[B, H, W, C]`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Weight,
    /// `[O]`, f32
    bias: Option<Tensor>,
    shape: ConvShape,
}

impl Conv2d {
    /// `weight` is `[O, C, K, K]`, as files have it.
    ///
    /// # Errors
    /// A weight of another shape; device errors.
    pub fn new(weight: &Tensor, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        shapes::kernel(weight.dims(), shape)?;
        Self::of(Weight::new(&StoredWeight::of(weight.clone())?, weight.dtype(), Some(shape))?, bias, shape)
    }

    /// As [`crate::kernels::Linear::int8`]; a feature map is quantised as a whole, or, where the kernel is one pixel, by pixel. `weight` is `[O, C, K, K]`.
    ///
    /// # Errors
    /// A weight of another shape, or on a GPU.
    pub fn int8(weight: &Tensor, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        shapes::kernel(weight.dims(), shape)?;
        Self::of(Weight::int8(weight)?, bias, shape)
    }

    fn of(weight: Weight, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        let bias = bias.map(|b| b.to_dtype(DType::F32)).transpose()?;
        Ok(Self { weight, bias, shape })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(loader: &Loader, shape: ConvShape) -> Result<Self> {
        let ConvShape { inputs, outputs, kernel, .. } = shape;
        let LayerWeights { weight, bias } =
            loader.weights(&[outputs, inputs, kernel, kernel], Some(shape), Some(outputs))?;
        Ok(Self { weight, bias, shape })
    }

    /// `x` is `[B, H, W, C]`; returns `[B, H', W', O]` in the dtype of `x`.
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
        let out = shapes::conv2d(x, self.bias.as_ref(), self.shape, epilogue)?;
        if shapes::is_empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.on_device_of(x)? {
            ResidentWeight::Packed(weight) => {
                let bias = self.bias.as_ref();
                cpu::conv2d(&cpu::Conv2dTask { x, weight, bias, shape: self.shape, epilogue, out: &out })
            }
            ResidentWeight::Tensor(weight) => reference::conv2d(x, weight, self.bias.as_ref(), self.shape, epilogue),
        }
    }
}
