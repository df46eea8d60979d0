//! LoRAs and related adapters of a request: the field `loras`.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::conditioning::image_adapters::AdapterFacts;
use crate::inference::request::lora_blocks::BlockWeights;
use crate::layers::OneOrMany;
use crate::model::lora::LoraFacts;

/// An adapter file: LoRA, LoCon, LoHa, LoKr, DoRA, IA³, OFT or full differences, for the UNet, the text encoders or both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct LoraOptions {
    /// A safetensors file below a model root or in a folder `loras` there, with or without its extension; or the file's name
    /// alone, in any folder below a root.
    #[serde(alias = "name", skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Multiplier of the adapter, -10 to 10. Default: 1.
    #[serde(alias = "scale", skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Multiplier in the UNet, -10 to 10. Default: `weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet_weight: Option<f64>,
    /// Multiplier in both text encoders, -10 to 10. Default: `weight`.
    #[serde(alias = "te_weight", skip_serializing_if = "Option::is_none")]
    pub text_encoder_weight: Option<f64>,
    /// Multiplier in the second text encoder, -10 to 10. Default: `text_encoder_weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder_2_weight: Option<f64>,
    /// Additional multipliers, -10 to 10, for parts of the UNet such as `down_blocks.1`, `mid_block` or
    /// `up_blocks.0.attentions.1`; the longest name that a layer begins with applies. Or a list of 12 or 20 numbers, as in
    /// AUTOMATIC1111's LoRA Block Weight, the text encoders' first. Default: 1.
    #[serde(alias = "lbw", skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockWeights>,
}

impl LoraOptions {
    /// The file `name` at its defaults.
    pub(crate) fn named(name: &str) -> Self {
        Self { model: Some(name.to_owned()), ..Self::default() }
    }
}

/// The field `loras`: a list, or a single element. A string stands for the element with that `model`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "OneOrMany<LoraEntry>")]
pub struct LoraList(pub Vec<LoraOptions>);

impl From<OneOrMany<LoraEntry>> for LoraList {
    fn from(OneOrMany(entries): OneOrMany<LoraEntry>) -> Self {
        Self(entries.into_iter().map(|LoraEntry(options)| options).collect())
    }
}

/// Options, or the `model` alone.
struct LoraEntry(LoraOptions);

impl<'de> Deserialize<'de> for LoraEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;

        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = LoraEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object, or the name of a file")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<LoraEntry, E> {
                Ok(LoraEntry(LoraOptions::named(name)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<LoraEntry, A::Error> {
                LoraOptions::deserialize(MapAccessDeserializer::new(map)).map(LoraEntry)
            }

            fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<LoraEntry, D::Error> {
                LoraOptions::deserialize(deserializer).map(LoraEntry)
            }
        }

        deserializer.deserialize_any(EntryVisitor)
    }
}

impl JsonSchema for LoraList {
    fn schema_name() -> Cow<'static, str> {
        "LoraList".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = generator.subschema_for::<LoraOptions>();
        let name = schemars::json_schema!({ "type": "string" });
        let many = schemars::json_schema!({ "type": "array", "items": { "anyOf": [one, name] } });
        schemars::json_schema!({ "anyOf": [many, one, name] })
    }
}

/// The report of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum AppliedAdapter {
    Picture(AdapterFacts),
    Lora(LoraFacts),
}
