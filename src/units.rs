//! Quantities with their units in the type: bytes, shares of a memory, image sides, step counts; and number formats.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU16;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};

/// Number format of activations and arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    #[must_use]
    pub fn tensor(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
            Self::F16 => candle_core::DType::F16,
        }
    }
}

/// Numbers in which the UNet multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// The compute dtype.
    #[default]
    None,
    /// Signed bytes: weights by output, activations by token or feature map. On the CPU only.
    Int8,
}

impl Quantization {
    pub const ALL: [Self; 2] = [Self::None, Self::Int8];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Int8 => "int8",
        }
    }
}

/// A number of bytes. Read from a number or from text with a unit (`1024MB`, `7 GiB`), written as a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    pub const KIB: u64 = 1 << 10;
    pub const MIB: u64 = 1 << 20;

    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl std::ops::Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self(0), |a, b| a + b)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
    }
}

impl std::str::FromStr for Bytes {
    type Err = String;

    /// Reads `1024MB`, `7 GiB`, `512`.
    fn from_str(text: &str) -> Result<Self, String> {
        let size: bytesize::ByteSize = text.parse()?;
        Ok(Self(size.as_u64()))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;

        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or text such as `1024MB`")
            }

            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(BytesVisitor)
    }
}

impl JsonSchema for Bytes {
    fn schema_name() -> Cow<'static, str> {
        "Bytes".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        if generator.contract().is_deserialize() {
            schemars::json_schema!({ "type": ["integer", "string"], "minimum": 0 })
        } else {
            schemars::json_schema!({ "type": "integer", "minimum": 0 })
        }
    }
}

/// A limit on memory: `auto`, a number of bytes, text with a unit (`4GB`), or a share (`60%`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Allowance {
    /// Depends on the memory that is found.
    #[default]
    Auto,
    Bytes(Bytes),
    /// Percent.
    Share(u8),
}

impl Allowance {
    /// The limit in bytes on a memory of `total`; `None` for `auto`, and for a share if `total` is unknown.
    #[must_use]
    pub fn of(self, total: Option<Bytes>) -> Option<Bytes> {
        match self {
            Self::Auto => None,
            Self::Bytes(bytes) => Some(bytes),
            Self::Share(percent) => total.map(|total| Bytes(total.0 / 100 * u64::from(percent))),
        }
    }
}

impl std::str::FromStr for Allowance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        match text.strip_suffix('%') {
            Some(percent) => match percent.trim().parse() {
                Ok(percent @ 1..=100) => Ok(Self::Share(percent)),
                _ => Err(format!("a share is 1% to 100%, got `{text}`")),
            },
            None => text.parse().map(Self::Bytes),
        }
    }
}

impl Serialize for Allowance {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Bytes(bytes) => bytes.serialize(serializer),
            Self::Share(percent) => serializer.collect_str(&format_args!("{percent}%")),
        }
    }
}

impl<'de> Deserialize<'de> for Allowance {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AllowanceVisitor;

        impl Visitor<'_> for AllowanceVisitor {
            type Value = Allowance;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`auto`, a number of bytes, or text such as `1024MB` or `60%`")
            }

            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<Allowance, E> {
                Ok(Allowance::Bytes(Bytes(bytes)))
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<Allowance, E> {
                Ok(Allowance::Auto)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Allowance, E> {
                text.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(AllowanceVisitor)
    }
}

impl JsonSchema for Allowance {
    fn schema_name() -> Cow<'static, str> {
        "Allowance".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": ["integer", "string", "null"], "minimum": 0 })
    }
}

/// A number of denoising steps, 1 to 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps(NonZeroU16);

impl Steps {
    pub const MAX: u16 = 1000;

    /// `None` outside 1..=1000.
    #[must_use]
    pub fn new(steps: u32) -> Option<Self> {
        let steps = u16::try_from(steps).ok().filter(|&s| s <= Self::MAX)?;
        NonZeroU16::new(steps).map(Self)
    }

    #[must_use]
    pub fn get(self) -> usize {
        usize::from(self.0.get())
    }
}

/// Width and height of an image in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    pub width: usize,
    pub height: usize,
}
