//! The weights of a layer on the CPU. Convolutions, INT8 weights and small plain weights are packed into panels when the
//! layer is made. All others stay in the format and order of their file, and each panel is packed when a product needs it
//! (`streaming_pack.rs`).

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

use crate::allocator;
use crate::kernels::block_format::Coding;
use crate::kernels::cpu::aligned::AlignedBuffer;
use crate::kernels::cpu::dequantize::EncodedRows;
use crate::kernels::cpu::micro::tile::{Operands, PANEL};
use crate::kernels::cpu::panels::{PackedPanels, PanelFormat, WeightShape};
use crate::kernels::cpu::prefetch::PrefetchRows;
use crate::kernels::cpu::tensor_guard::TensorGuard;
use crate::kernels::stored_weight::StoredWeight;

/// The deepest weights that are quantized: sums of products of bytes fit an i32.
const MAX_INT8_DEPTH: usize = i32::MAX as usize / (127 * 127);

/// The weights of a linear layer or convolution.
#[derive(Debug)]
pub(crate) struct PackedWeight {
    weights: PackedStorage,
    shape: WeightShape,
}

#[derive(Debug)]
enum PackedStorage {
    Panels(PackedPanels),
    Stored(StoredRows),
}

/// PackedStorage in the format and order of their file.
#[derive(Debug)]
struct StoredRows {
    /// `[O, C, ..]`, contiguous, or the bytes of their blocks.
    tensor: Tensor,
    coding: Coding,
    /// The dtype that the numbers are rounded to before they are used; f32 if they are not rounded.
    rounded: DType,
    /// Multiplier of the numbers.
    scale: f32,
}

impl PackedWeight {
    /// `weight` is `[O, C, ..]` with any axes behind; the depth is those axes, then `C`. `compute` is the dtype in which the
    /// network computes; with `in_file_order` weights of several taps are read in the order of the file.
    pub(crate) fn new(weight: &StoredWeight, compute: DType, in_file_order: bool) -> Result<Self> {
        let &[outputs, channels, ref taps @ ..] = weight.dims() else {
            bail!("weights must have outputs and inputs, got {:?}", weight.dims());
        };
        let shape = WeightShape { outputs, channels, taps: taps.iter().product() };
        let coding = weight.coding();
        // Encoded weights grow when they are packed, however small they are.
        let stays = coding.dtype().is_none() || weight.bytes() >= allocator::LARGE;
        let as_stored = in_file_order || (shape.taps == 1 && stays);
        // Each row must begin at a part of a block that can be decoded alone.
        if as_stored && shape.depth().is_multiple_of(coding.grain()) {
            let (tensor, rounded) = (weight.tensor().contiguous()?, coding.rounding(compute));
            let stored = StoredRows { tensor, coding, rounded, scale: weight.scale() };
            return Ok(Self { weights: PackedStorage::Stored(stored), shape });
        }
        let numbers = weight.numbers(coding.widened(compute))?.contiguous()?;
        Ok(Self { weights: PackedStorage::Panels(PackedPanels::new(&numbers, shape)?), shape })
    }

    /// Rounds the weights of each output to 127 steps on either side of zero, so that the largest is exact. PackedStorage that are
    /// too deep for bytes, or have no depth, are packed as [`Self::new`] packs them.
    pub(crate) fn int8(weight: &Tensor) -> Result<Self> {
        let depth: usize = weight.dims()[1..].iter().product();
        if !(1..=MAX_INT8_DEPTH).contains(&depth) {
            return Self::new(&StoredWeight::of(weight.clone())?, weight.dtype(), false);
        }
        let weight = match weight.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => weight.contiguous()?,
            _ => weight.to_dtype(DType::F32)?.contiguous()?,
        };
        let taps = weight.dims()[2..].iter().product();
        let shape = WeightShape { outputs: weight.dim(0)?, channels: weight.dim(1)?, taps };
        Ok(Self { weights: PackedStorage::Panels(PackedPanels::int8(&weight, shape)?), shape })
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            PackedStorage::Panels(panels) => panels.bytes(),
            PackedStorage::Stored(stored) => stored.tensor.elem_count() * stored.tensor.dtype().size_in_bytes(),
        }
    }

    /// Locks weights in file order for reading.
    pub(crate) fn guard(&self) -> Option<TensorGuard<'_>> {
        match &self.weights {
            PackedStorage::Panels(_) => None,
            PackedStorage::Stored(stored) => Some(TensorGuard::new(&stored.tensor)),
        }
    }

    /// The rows that `guard` locks.
    pub(crate) fn rows<'a>(&self, guard: &'a TensorGuard<'a>) -> Result<Option<EncodedRows<'a>>> {
        let PackedStorage::Stored(stored) = &self.weights else { return Ok(None) };
        Ok(Some(EncodedRows {
            bytes: guard.bytes()?,
            coding: stored.coding,
            rounded: stored.rounded,
            scale: stored.scale,
            outputs: self.outputs(),
            depth: self.depth(),
        }))
    }

    /// Packs weights in file order, for one product.
    fn pack(&self, stored: &StoredRows) -> Result<PackedPanels> {
        let WeightShape { outputs, channels, taps } = self.shape;
        let shape = [outputs, channels, taps];
        let weight = StoredWeight::new(stored.tensor.clone(), stored.coding, stored.scale, &shape)?;
        PackedPanels::new(&weight.numbers(stored.coding.widened(stored.rounded))?, self.shape)
    }

    /// True if the weights are bytes, for activations that are bytes.
    pub(crate) fn is_int8(&self) -> bool {
        matches!(&self.weights, PackedStorage::Panels(panels) if panels.format() == PanelFormat::Int8)
    }

    /// Scales and offsets of a panel of bytes.
    pub(crate) fn dequantization(&self, panel: usize) -> Option<(&[f32; PANEL], &[i32; PANEL])> {
        match &self.weights {
            PackedStorage::Panels(panels) => panels.dequantization(panel),
            PackedStorage::Stored(_) => None,
        }
    }

    pub(crate) fn outputs(&self) -> usize {
        self.shape.outputs
    }

    pub(crate) fn depth(&self) -> usize {
        self.shape.depth()
    }

    /// True if bf16 operands can be multiplied: the weights are bf16, or are rounded to it.
    pub(crate) fn is_bf16(&self) -> bool {
        match &self.weights {
            PackedStorage::Panels(panels) => panels.format() == PanelFormat::Bf16,
            PackedStorage::Stored(stored) if stored.rounded == DType::F32 => stored.coding == Coding::Bf16,
            PackedStorage::Stored(stored) => stored.rounded == DType::BF16,
        }
    }
}

/// The panels of a layer during one product.
pub(crate) enum PanelSource<'a> {
    Packed(&'a PackedPanels),
    /// Panels of a convolution that rarely runs as a product; kept, they would be a second copy of the weights.
    Temporary(PackedPanels),
    Streamed(EncodedRows<'a>),
}

impl<'a> PanelSource<'a> {
    /// `guard` is the one of `weight`.
    pub(crate) fn new(weight: &'a PackedWeight, guard: Option<&'a TensorGuard<'a>>) -> Result<Self> {
        let stored = match &weight.weights {
            PackedStorage::Panels(panels) => return Ok(Self::Packed(panels)),
            PackedStorage::Stored(stored) => stored,
        };
        let guard = guard.filter(|_| weight.shape.taps == 1);
        Ok(match guard.map(|guard| weight.rows(guard)).transpose()?.flatten() {
            Some(rows) => Self::Streamed(rows),
            None => Self::Temporary(weight.pack(stored)?),
        })
    }

    /// `depth` of panel `panel`, which begins at a multiple of 32, for a micro-kernel of `operands`: the packed panel, or
    /// one made in `scratch`. It has zeros beyond the weights.
    pub(crate) fn panel<'b>(
        &'b self,
        operands: Operands,
        panel: usize,
        depth: Range<usize>,
        scratch: &'b mut AlignedBuffer,
    ) -> &'b [u8] {
        match self {
            Self::Packed(panels) => panels.panel(operands, panel, depth, scratch),
            Self::Temporary(panels) => panels.panel(operands, panel, depth, scratch),
            Self::Streamed(rows) => rows.panel(operands, panel, depth, scratch),
        }
    }

    /// Prefetches what [`Self::panel`] reads for `depth`, in `parts` parts.
    pub(crate) fn prefetch(&self, panel: usize, depth: Range<usize>, parts: usize) -> PrefetchRows {
        match self {
            _ if depth.is_empty() => PrefetchRows::none(),
            Self::Packed(panels) => panels.prefetch(panel, depth, parts),
            Self::Temporary(panels) => panels.prefetch(panel, depth, parts),
            Self::Streamed(rows) => rows.prefetch(panel, depth, parts),
        }
    }
}
