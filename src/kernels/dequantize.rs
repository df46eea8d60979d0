//! Converts stored weights to tensors of numbers.

use candle_core::{DType, Result, Tensor};

use crate::kernels::cpu;
use crate::kernels::stored_weight::StoredWeight;

impl StoredWeight {
    /// The numbers on the CPU, of [`Self::dims`], rounded once to `dtype`. Numbers of that dtype are not copied.
    ///
    /// # Errors
    /// Device errors.
    pub fn numbers(&self, dtype: DType) -> Result<Tensor> {
        match self.coding().dtype() {
            Some(own) if own == dtype && self.scale() == 1.0 => self.tensor().reshape(self.dims()),
            _ => cpu::dequantize::to_tensor(self, dtype),
        }
    }

    /// The numbers as a network that computes in `compute` uses them.
    ///
    /// # Errors
    /// Device errors.
    pub fn used(&self, compute: DType) -> Result<Tensor> {
        self.numbers(self.coding().widened(compute))
    }
}
