//! Weights in the layout that the kernels of a device read, and weights that stay on the host until a layer needs them.
//!
//! An offloaded weight is brought for one use and dropped behind it, for devices with less memory than a network has
//! weights. It travels to a GPU as it is stored, widened before. On the CPU it lies in its file, which is mapped, and
//! panels for the kernels are packed at every use rather than once beside the file.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};

use crate::kernels::block_format::Coding;
use crate::kernels::conv_shape::{ConvShape, Padding};
use crate::kernels::cpu;
use crate::kernels::stored_weight::StoredWeight;

/// The weight of a layer.
#[derive(Clone, Debug)]
pub(crate) enum Weight {
    Resident(ResidentWeight),
    Offloaded(OffloadedWeight),
}

/// A weight on the device that computes.
#[derive(Clone, Debug)]
pub(crate) enum ResidentWeight {
    /// On the CPU.
    Packed(Arc<cpu::PackedWeight>),
    /// `[O, I]` or `[O, K, K, C]`; or of a norm or table, as it is stored.
    Tensor(Tensor),
}

/// A weight on the host, as it is stored.
#[derive(Clone, Debug)]
pub(crate) struct OffloadedWeight {
    /// `[O, I]` or `[O, C, K, K]`
    weight: StoredWeight,
    /// The dtype in which the network computes.
    compute: DType,
    /// Geometry of a convolution.
    conv: Option<ConvShape>,
}

impl Weight {
    /// `weight` is `[O, I]` or `[O, C, K, K]`, of a network that computes in `compute`; `conv` is the geometry of a
    /// convolution.
    pub(crate) fn new(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<Self> {
        ResidentWeight::new(weight, compute, conv).map(Self::Resident)
    }

    /// As [`Self::new`], in signed bytes.
    pub(crate) fn int8(weight: &Tensor) -> Result<Self> {
        if !weight.device().is_cpu() {
            bail!("INT8 weights are for the CPU");
        }
        Ok(Self::Resident(ResidentWeight::Packed(Arc::new(cpu::PackedWeight::int8(weight)?))))
    }

    /// As [`Self::new`], of a weight on the host that stays as it is stored.
    pub(crate) fn offloaded(weight: StoredWeight, compute: DType, conv: Option<ConvShape>) -> Self {
        Self::Offloaded(OffloadedWeight { weight, compute, conv })
    }

    /// A tensor that is used as it is.
    pub(crate) fn tensor(tensor: Tensor) -> Self {
        Self::Resident(ResidentWeight::Tensor(tensor))
    }

    /// The tensor of [`Self::tensor`].
    pub(crate) fn into_tensor(self) -> Result<Tensor> {
        match self {
            Self::Resident(ResidentWeight::Tensor(tensor)) => Ok(tensor),
            _ => bail!("a layer has the name of another one of another kind"),
        }
    }

    /// The weight on the device of `x`: as it is, or brought for this one use.
    pub(crate) fn on_device_of(&self, x: &Tensor) -> Result<Cow<'_, ResidentWeight>> {
        match self {
            Self::Resident(weight) => Ok(Cow::Borrowed(weight)),
            Self::Offloaded(OffloadedWeight { weight, compute, conv }) => Ok(Cow::Owned(match x.device().is_cpu() {
                true => ResidentWeight::new(weight, *compute, *conv)?,
                false => ResidentWeight::on_gpu(&weight.numbers(x.dtype())?.to_device(x.device())?)?,
            })),
        }
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Resident(ResidentWeight::Packed(packed)) => packed.bytes(),
            Self::Resident(ResidentWeight::Tensor(tensor)) => tensor_bytes(tensor),
            Self::Offloaded(offloaded) => offloaded.weight.bytes(),
        }
    }
}

impl ResidentWeight {
    fn new(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<Self> {
        if !weight.device().is_cpu() {
            return Self::on_gpu(weight.tensor());
        }
        let in_file_order = conv.is_some_and(|shape| cpu::reads_file_order(shape, compute));
        Ok(Self::Packed(Arc::new(cpu::PackedWeight::new(weight, compute, in_file_order)?)))
    }

    fn on_gpu(weight: &Tensor) -> Result<Self> {
        Ok(Self::Tensor(match weight.rank() {
            4 => weight.permute((0, 2, 3, 1))?.contiguous()?, // [O, K, K, C]
            _ => weight.contiguous()?,
        }))
    }
}

/// Bytes of a tensor's numbers.
pub(crate) fn tensor_bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// True if convolutions on the CPU read weights of this shape, `[O, C, K, K]`, in the order of the file, without a packed
/// copy, in a network that computes in `compute`. A stride of 1 is assumed, as most convolutions have it.
#[must_use]
pub fn stays_as_stored(weight: &[usize], compute: DType) -> bool {
    let &[outputs, inputs, kernel, _] = weight else { return false };
    let padding = Padding::same(kernel / 2);
    cpu::reads_file_order(ConvShape { inputs, outputs, kernel, stride: 1, padding }, compute)
}

/// Bytes that a layer on the CPU keeps of a weight of this shape in `coding`, in a network that computes in `compute`;
/// `None` for parts of a block.
#[must_use]
pub fn bytes_held(weight: &[usize], coding: Coding, compute: DType) -> Option<usize> {
    let count = weight.iter().product();
    let depth = weight.iter().skip(1).product::<usize>();
    let taps = weight.iter().skip(2).product::<usize>();
    let is_read = weight.len() > 1 && (taps == 1 || stays_as_stored(weight, compute));
    match coding.dtype() {
        None if !is_read || !depth.is_multiple_of(coding.grain()) => {
            coding.bytes(count).map(|_| count * coding.widened(compute).size_in_bytes())
        }
        _ => coding.bytes(count),
    }
}
