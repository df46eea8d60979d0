//! Codings of numbers in files: plain numbers, eight-bit floats, and blocks that share a scale. Blocks are GGUF's,
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; eight-bit floats follow Micikevicius et al. 2022,
//! <https://arxiv.org/abs/2209.05433>.

use candle_core::DType;

/// A number format of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Coding {
    F32,
    F16,
    Bf16,
    /// Four bits of exponent, three of mantissa; no infinities.
    E4m3,
    /// Five bits of exponent, two of mantissa: the upper byte of an f16.
    E5m2,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Numbers of a block that can be decoded without the others.
pub(crate) const GRAIN: usize = 32;

impl Coding {
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::E4m3,
        Self::E5m2,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::E4m3 => "f8_e4m3",
            Self::E5m2 => "f8_e5m2",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// Numbers and bytes of a block.
    #[must_use]
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::E4m3 | Self::E5m2 => (1, 1),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of `count` numbers, whole blocks; `None` for parts of a block or more than can be counted.
    #[must_use]
    pub fn bytes(self, count: usize) -> Option<usize> {
        let (numbers, bytes) = self.block();
        if count.is_multiple_of(numbers) { (count / numbers).checked_mul(bytes) } else { None }
    }

    /// The tensor dtype of plain numbers.
    pub(crate) fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// Granularity at which numbers can be decoded.
    pub(crate) fn grain(self) -> usize {
        if self.block().0 == 1 { 1 } else { GRAIN }
    }

    /// The dtype to which numbers are rounded before a network that computes in `compute` uses them; f32 if they are used
    /// unrounded.
    pub(crate) fn rounding(self, compute: DType) -> DType {
        match (self, compute) {
            (Self::F32 | Self::Bf16, DType::BF16) | (Self::F32 | Self::F16, DType::F16) => DType::F32,
            (_, DType::BF16 | DType::F16) => compute,
            _ => DType::F32,
        }
    }

    /// The narrowest dtype that holds numbers after [`Self::rounding`].
    pub(crate) fn widened(self, compute: DType) -> DType {
        match (self.rounding(compute), self.dtype()) {
            (DType::F32, Some(own)) => own,
            (rounding, _) => rounding,
        }
    }
}
