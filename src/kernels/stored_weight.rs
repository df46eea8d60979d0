//! Weights as files store them: numbers of a dtype, eight-bit floats or blocks, with a factor.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::kernels::block_format::Coding;

/// A weight in any coding.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    /// The numbers themselves where the coding is a dtype's, bytes of it otherwise.
    tensor: Tensor,
    coding: Coding,
    /// Factor of the whole weight.
    scale: f32,
    shape: Vec<usize>,
}

impl StoredWeight {
    /// `tensor` has the bytes of as many numbers as `shape` has, or these numbers; each counts `scale` times.
    ///
    /// # Errors
    /// Bytes of another count of numbers.
    pub fn new(tensor: Tensor, coding: Coding, scale: f32, shape: &[usize]) -> Result<Self> {
        let count = shape.iter().try_fold(1_usize, |count, side| count.checked_mul(*side));
        let wanted = count.and_then(|count| coding.bytes(count));
        if wanted != Some(tensor.elem_count() * tensor.dtype().size_in_bytes()) {
            bail!("{:?} is not the size of {shape:?} in {}", tensor.dims(), coding.name());
        }
        Ok(Self { tensor, coding, scale, shape: shape.to_vec() })
    }

    /// A tensor of numbers. Other dtypes than f32, f16 and bf16 are cast to f32.
    ///
    /// # Errors
    /// The cast's.
    pub fn of(tensor: Tensor) -> Result<Self> {
        let (tensor, coding) = match tensor.dtype() {
            DType::F16 => (tensor, Coding::F16),
            DType::BF16 => (tensor, Coding::Bf16),
            DType::F32 => (tensor, Coding::F32),
            _ => (tensor.to_dtype(DType::F32)?, Coding::F32),
        };
        let shape = tensor.dims().to_vec();
        Ok(Self { tensor, coding, scale: 1.0, shape })
    }

    /// The same numbers in another shape.
    ///
    /// # Errors
    /// A shape of another count.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        let tensor = if self.coding.dtype().is_some() { self.tensor.reshape(shape)? } else { self.tensor };
        Self::new(tensor, self.coding, self.scale, shape)
    }

    /// These numbers `factor` times as great.
    #[must_use]
    pub fn times(self, factor: f32) -> Self {
        Self { scale: self.scale * factor, ..self }
    }

    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    #[must_use]
    pub fn device(&self) -> &Device {
        self.tensor.device()
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tensor.elem_count() * self.tensor.dtype().size_in_bytes()
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub(crate) fn coding(&self) -> Coding {
        self.coding
    }

    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }
}
