//! Number formats of files of weights.

use crate::kernels::Coding;

/// Number formats of files that this worker distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoredDtype {
    F64,
    F32,
    F16,
    Bf16,
    /// Eight-bit floats and numbers in blocks, for which tensors have no dtype.
    Coded(Coding),
    /// Integers and booleans, named as in the file; no weight is one.
    Other(&'static str),
}

impl StoredDtype {
    /// safetensors' names, and bytes of a number.
    pub(crate) const KNOWN: &'static [(&'static str, Self, u64)] = &[
        ("F64", Self::F64, 8),
        ("F32", Self::F32, 4),
        ("F16", Self::F16, 2),
        ("BF16", Self::Bf16, 2),
        ("F8_E4M3", Self::Coded(Coding::E4m3), 1),
        ("F8_E5M2", Self::Coded(Coding::E5m2), 1),
        ("I64", Self::Other("i64"), 8),
        ("U64", Self::Other("u64"), 8),
        ("I32", Self::Other("i32"), 4),
        ("U32", Self::Other("u32"), 4),
        ("I16", Self::Other("i16"), 2),
        ("U16", Self::Other("u16"), 2),
        ("I8", Self::Other("i8"), 1),
        ("U8", Self::Other("u8"), 1),
        ("BOOL", Self::Other("bool"), 1),
    ];

    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Coded(coding) => coding.name(),
            Self::Other(name) => name,
        }
    }

    /// True if weights may be stored in this format.
    pub(crate) fn is_weight(self) -> bool {
        !matches!(self, Self::Other(_))
    }

    /// The coding of weights in this format; `None` if they must be cast before, or are no weights.
    pub(crate) fn coding(self) -> Option<Coding> {
        match self {
            Self::F32 => Some(Coding::F32),
            Self::F16 => Some(Coding::F16),
            Self::Bf16 => Some(Coding::Bf16),
            Self::Coded(coding) => Some(coding),
            Self::F64 | Self::Other(_) => None,
        }
    }
}
