//! Convolutions over feature maps.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::kernels::conv_shape::ConvShape;
use crate::kernels::epilogue::Epilogue;
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::weight::Weight;
use crate::kernels::{cpu, offload, reference, shapes, shared_layers};

/// A convolution over `[B, H, W, C]`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    pub(crate) weight: Weight,
    /// `[O]`, f32
    pub(crate) bias: Option<Tensor>,
    shape: ConvShape,
}

impl Conv2d {
    /// `weight` as files have it: `[O, C, K, K]`; it is re-laid here.
    ///
    /// # Errors
    /// Those of the re-layout.
    pub fn new(weight: &Tensor, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        shapes::kernel(weight.dims(), shape)?;
        Self::of(Weight::new(&StoredWeight::of(weight.clone())?, weight.dtype(), Some(shape))?, bias, shape)
    }

    /// As [`Linear::int8`]; bytes are made of each sample's whole feature map, or, where the kernel is one pixel, of each
    /// pixel. `weight` is `[O, C, K, K]`.
    ///
    /// # Errors
    /// A weight of another shape, or on a GPU.
    pub fn int8(weight: &Tensor, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        shapes::kernel(weight.dims(), shape)?;
        Self::of(Weight::int8(weight)?, bias, shape)
    }

    fn of(weight: Weight, bias: Option<Tensor>, shape: ConvShape) -> Result<Self> {
        let bias = bias.map(|b| offload::brought(b.to_dtype(DType::F32)?)).transpose()?;
        Ok(Self { weight, bias, shape })
    }

    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn load(vb: &VarBuilder, shape: ConvShape) -> Result<Self> {
        shared_layers::layer(vb, || {
            let weight = StoredWeight::read(vb, (shape.outputs, shape.inputs, shape.kernel, shape.kernel))?;
            shapes::kernel(weight.dims(), shape)?;
            Self::of(Weight::load(&weight, vb, Some(shape))?, Some(vb.get(shape.outputs, "bias")?), shape)
        })
    }

    /// `x` is `[B, H, W, C]`; gives `[B, H', W', O]` in the dtype of `x`.
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
        let out = shapes::conv2d(x, self.bias.as_ref(), self.shape, epilogue)?;
        if shapes::is_empty(&out) {
            return Tensor::zeros(out, x.dtype(), x.device());
        }
        match &*self.weight.beside(x)? {
            Weight::Packed(weight) => cpu::conv2d(x, weight, self.bias.as_ref(), self.shape, (epilogue, &out)),
            Weight::Tensor(weight) => reference::conv2d(x, weight, self.bias.as_ref(), self.shape, epilogue),
            Weight::Away(_) => offload::still(),
        }
    }
}
