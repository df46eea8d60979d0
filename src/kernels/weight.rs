//! A weight in the layout that the kernels of its device read.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::kernels::block_format::Coding;
use crate::kernels::conv_shape::{ConvShape, Padding};
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::{cpu, int8_policy, load_stats, offload};

/// Weights as their device's kernels want them.
#[derive(Clone, Debug)]
pub(crate) enum Weight {
    /// On the CPU.
    Packed(Arc<cpu::PackedWeight>),
    /// `[O, I]` or `[O, K, K, C]`.
    Tensor(Tensor),
    /// As the file has it, on the host; [`Weight::beside`] brings it.
    Away(offload::Away),
}

impl Weight {
    /// `weight` is `[O, I]` or `[O, C, K, K]`, of a network that computes in `compute`; `conv` the shape of its convolution.
    pub(crate) fn new(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<Self> {
        match weight.device().is_cpu() {
            true if offload::is_chosen() => Ok(Self::Away(offload::Away { weight: weight.clone(), compute, conv })),
            true => {
                let packed = Self::packed(weight, compute, conv)?;
                load_stats::count(weight, packed.bytes());
                Ok(Self::Packed(Arc::new(packed)))
            }
            false => Self::on_device(weight.tensor()),
        }
    }

    pub(crate) fn on_host(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<Self> {
        Ok(Self::Packed(Arc::new(Self::packed(weight, compute, conv)?)))
    }

    fn packed(weight: &StoredWeight, compute: DType, conv: Option<ConvShape>) -> Result<cpu::PackedWeight> {
        let by_filters = conv.is_some_and(|shape| cpu::by_filters(shape, compute));
        cpu::PackedWeight::new(weight, compute, by_filters)
    }

    /// As [`Self::new`], of one that is on a GPU.
    pub(crate) fn on_device(weight: &Tensor) -> Result<Self> {
        Ok(Self::Tensor(match weight.rank() {
            4 => weight.permute((0, 2, 3, 1))?.contiguous()?, // [O, K, K, C]
            _ => weight.contiguous()?,
        }))
    }

    /// As [`Self::new`], in signed bytes.
    pub(crate) fn int8(weight: &Tensor) -> Result<Self> {
        if !weight.device().is_cpu() {
            candle_core::bail!("INT8 weights are for the CPU");
        }
        Ok(Self::Packed(Arc::new(cpu::PackedWeight::int8(weight)?)))
    }

    /// Of the layer `vb`: in bytes where [`quantizing`] has it so.
    pub(crate) fn load(weight: &StoredWeight, vb: &VarBuilder, conv: Option<ConvShape>) -> Result<Self> {
        if !weight.device().is_cpu() || !int8_policy::is_chosen(&vb.prefix(), weight.dims()) {
            return Self::new(weight, vb.dtype(), conv);
        }
        let packed = cpu::PackedWeight::int8(&weight.used(vb.dtype())?)?;
        int8_policy::count(weight.bytes().saturating_sub(packed.bytes()));
        load_stats::count(weight, packed.bytes());
        Ok(Self::Packed(Arc::new(packed)))
    }
}

/// Whether convolutions on the CPU read weights of this shape, `[O, C, K, K]`, in the order of the file, and lay none
/// beside them, in a network that computes in `compute`; most convolutions have a stride of 1.
#[must_use]
pub fn stays_as_stored(weight: &[usize], compute: DType) -> bool {
    let &[outputs, inputs, kernel, _] = weight else { return false };
    let padding = Padding::same(kernel / 2);
    cpu::by_filters(ConvShape { inputs, outputs, kernel, stride: 1, padding }, compute)
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
