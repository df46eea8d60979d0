//! The number formats of files of weights.

use crate::kernels::Coding;

/// Number formats that files have and this worker can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoredDtype {
    F64,
    F32,
    F16,
    Bf16,
    /// What tensors cannot be: eight-bit floats, and numbers in blocks.
    Coded(Coding),
    /// Integers and booleans, named as in the file; no weight is one.
    Other(&'static str),
}

impl StoredDtype {
    /// By the names of safetensors, with their bytes.
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

    /// The name of the wire.
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

    /// Whether weights may be stored so.
    pub(crate) fn is_weight(self) -> bool {
        !matches!(self, Self::Other(_))
    }

    /// How weights are read that are stored so; `None` for what must be cast before, or is no weight.
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
