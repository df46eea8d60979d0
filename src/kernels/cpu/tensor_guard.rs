//! Read access to the memory of candle's CPU tensors.

use std::ops::Deref;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::kernels::cpu::element::{Element, as_bytes};

/// The numbers of a tensor in the tensor's own dtype.
#[derive(Clone, Copy)]
pub(crate) enum TypedSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A tensor's memory, locked for reading.
pub(crate) struct TensorGuard<'a> {
    /// The read lock, whose type candle does not re-export.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    layout: &'a Layout,
}

impl<'a> TensorGuard<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage: Box::new(storage), layout }
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &**self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("the operands lie on different devices"),
        }
    }

    /// The numbers from the tensor's first on, for tensors that are read by their strides.
    pub(crate) fn strided<T: Element>(&self) -> Result<&[T]> {
        let all = T::cpu_storage_as_slice(self.cpu()?)?;
        match all.get(self.layout.start_offset()..) {
            Some(rest) => Ok(rest),
            None => bail!("a tensor begins beyond its storage"),
        }
    }

    /// All numbers in order. The tensor must be contiguous.
    pub(crate) fn slice<T: Element>(&self) -> Result<&[T]> {
        let Some((start, end)) = self.layout.contiguous_offsets() else {
            bail!("the tensor must be contiguous");
        };
        match T::cpu_storage_as_slice(self.cpu()?)?.get(start..end) {
            Some(numbers) => Ok(numbers),
            None => bail!("a tensor ends beyond its storage"),
        }
    }

    /// The bytes of all numbers in order. The tensor must be contiguous.
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        match self.cpu()? {
            CpuStorage::F32(_) => self.slice::<f32>().map(as_bytes),
            CpuStorage::BF16(_) => self.slice::<bf16>().map(as_bytes),
            CpuStorage::F16(_) => self.slice::<f16>().map(as_bytes),
            CpuStorage::U8(_) => self.slice::<u8>(),
            _ => bail!("weights must be f32, bf16, f16 or bytes"),
        }
    }

    pub(crate) fn typed_slice(&self) -> Result<TypedSlice<'_>> {
        match self.cpu()? {
            CpuStorage::F32(_) => self.slice().map(TypedSlice::F32),
            CpuStorage::BF16(_) => self.slice().map(TypedSlice::Bf16),
            CpuStorage::F16(_) => self.slice().map(TypedSlice::F16),
            _ => bail!("operands must be f32, bf16 or f16"),
        }
    }
}
