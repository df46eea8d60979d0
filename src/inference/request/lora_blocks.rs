//! Weights of an adapter by block of the UNet: by name, or in the lists of AUTOMATIC1111's LoRA Block Weight extension,
//! <https://github.com/hako-mikan/sd-webui-lora-block-weight>, which are for SDXL's own UNet.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::networks::unet::UnetConfig;

/// Blocks that a list of 12 has weights for, after the text encoders' own; the weight of other blocks is 0.
const OF_TWELVE: [&str; 11] =
    ["IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"];
/// Blocks of a list of 20 in its order, and diffusers' names of their parts.
const BLOCKS: [(&str, &[&str]); 19] = [
    ("IN00", &["conv_in"]),
    ("IN01", &["down_blocks.0.resnets.0"]),
    ("IN02", &["down_blocks.0.resnets.1"]),
    ("IN03", &["down_blocks.0.downsamplers"]),
    ("IN04", &["down_blocks.1.resnets.0", "down_blocks.1.attentions.0"]),
    ("IN05", &["down_blocks.1.resnets.1", "down_blocks.1.attentions.1"]),
    ("IN06", &["down_blocks.1.downsamplers"]),
    ("IN07", &["down_blocks.2.resnets.0", "down_blocks.2.attentions.0"]),
    ("IN08", &["down_blocks.2.resnets.1", "down_blocks.2.attentions.1"]),
    ("M00", &["mid_block"]),
    ("OUT00", &["up_blocks.0.resnets.0", "up_blocks.0.attentions.0"]),
    ("OUT01", &["up_blocks.0.resnets.1", "up_blocks.0.attentions.1"]),
    ("OUT02", &["up_blocks.0.resnets.2", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers"]),
    ("OUT03", &["up_blocks.1.resnets.0", "up_blocks.1.attentions.0"]),
    ("OUT04", &["up_blocks.1.resnets.1", "up_blocks.1.attentions.1"]),
    ("OUT05", &["up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers"]),
    ("OUT06", &["up_blocks.2.resnets.0"]),
    ("OUT07", &["up_blocks.2.resnets.1"]),
    ("OUT08", &["up_blocks.2.resnets.2"]),
];

/// Weights by the name of a block, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum BlockWeights {
    Named(BTreeMap<String, f64>),
    /// 12 or 20: the text encoders' first, then the UNet's from its input to its output.
    Listed(Vec<f64>),
}

impl BlockWeights {
    /// Weights by name, and the text encoders'.
    ///
    /// # Errors
    /// `invalid_parameter` for a list of another length, or for another UNet.
    pub(crate) fn named(&self, unet: &UnetConfig) -> Result<(BTreeMap<String, f64>, f64)> {
        let weights = match self {
            Self::Named(named) => return Ok((named.clone(), 1.0)),
            Self::Listed(weights) => weights,
        };
        let Some((&encoders, own)) = weights.split_first().filter(|_| matches!(weights.len(), 12 | 20)) else {
            let message = format!("must be 12 or 20 weights where they are a list, got {}", weights.len());
            return Err(Error::invalid("blocks", message));
        };
        if unet.block_out_channels.len() != 3 || (0..3).any(|block| unet.layers_per_block.at(block) != Some(&2)) {
            return Err(Error::invalid("blocks", "must be weights by name: lists are for SDXL's own UNet"));
        }
        let weight = |place: usize, block: &str| match own.len() {
            11 => OF_TWELVE.iter().position(|known| *known == block).and_then(|place| own.get(place)),
            _ => own.get(place),
        };
        let mut named = BTreeMap::new();
        for (place, (block, parts)) in BLOCKS.iter().enumerate() {
            let weight = weight(place, block).copied().unwrap_or(0.0);
            named.extend(parts.iter().map(|part| ((*part).to_owned(), weight)));
        }
        Ok((named, encoders))
    }
}

impl<'de> Deserialize<'de> for BlockWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BlocksVisitor;

        impl<'de> Visitor<'de> for BlocksVisitor {
            type Value = BlockWeights;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of numbers, or an array of them")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<BlockWeights, A::Error> {
                BTreeMap::deserialize(MapAccessDeserializer::new(map)).map(BlockWeights::Named)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<BlockWeights, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(items)).map(BlockWeights::Listed)
            }
        }

        deserializer.deserialize_any(BlocksVisitor)
    }
}

impl JsonSchema for BlockWeights {
    fn schema_name() -> Cow<'static, str> {
        "Blocks".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let named = schemars::json_schema!({ "type": "object", "additionalProperties": { "type": "number" } });
        let listed = schemars::json_schema!({ "type": "array", "items": { "type": "number" } });
        schemars::json_schema!({ "anyOf": [named, listed] })
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockWeights, UnetConfig};
    use crate::model::networks::PerBlock;

    #[test]
    fn block_lists_follow_the_single_files_blocks() {
        let unet = UnetConfig {
            block_out_channels: vec![320, 640, 1280],
            layers_per_block: PerBlock::Same(2),
            ..UnetConfig::default()
        };
        let twelve: Vec<f64> = (0..12).map(f64::from).collect();
        let (named, encoders) = BlockWeights::Listed(twelve.clone()).named(&unet).unwrap_or_default();
        assert_eq!(encoders, 0.0);
        for (block, weight) in [
            ("down_blocks.0.resnets.0", 0.0),
            ("down_blocks.1.attentions.0", 1.0),
            ("down_blocks.2.resnets.1", 4.0),
            ("mid_block", 5.0),
            ("up_blocks.0.attentions.0", 6.0),
            ("up_blocks.1.upsamplers", 11.0),
            ("up_blocks.2.resnets.2", 0.0),
        ] {
            assert_eq!(named.get(block), Some(&weight), "{block}");
        }
        let twenty: Vec<f64> = (0..20).map(f64::from).collect();
        let (named, _) = BlockWeights::Listed(twenty).named(&unet).unwrap_or_default();
        assert_eq!((named.get("conv_in"), named.get("mid_block")), (Some(&1.0), Some(&10.0)));
        assert!(BlockWeights::Listed(vec![1.0; 17]).named(&unet).is_err());
        // As single files have it.
        let each = UnetConfig { layers_per_block: PerBlock::Each(vec![2, 2, 2]), ..unet.clone() };
        assert!(BlockWeights::Listed(twelve.clone()).named(&each).is_ok());
        let uneven = UnetConfig { layers_per_block: PerBlock::Each(vec![2, 2, 1]), ..unet.clone() };
        assert!(BlockWeights::Listed(twelve.clone()).named(&uneven).is_err());
        let small = UnetConfig { layers_per_block: PerBlock::Same(1), ..unet };
        assert!(BlockWeights::Listed(twelve).named(&small).is_err());
    }
}
