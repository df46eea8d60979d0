//! What a request says of LoRA and its relatives: in a list, and in the prompt as AUTOMATIC1111 has it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::conditioning::image_adapters::AdapterFacts;
use crate::error::{Error, Result};
use crate::inference::plan::build::within;
use crate::inference::request::lora_blocks::Blocks;
use crate::layers::OneOrMany;
use crate::model::catalog::Catalog;
use crate::model::lora::{LoraChoice, LoraFacts, MOST};
use crate::model::networks::unet::UnetConfig;

/// The field in which tags stand.
const PROMPT: &str = "prompt";
/// How a prompt begins to name an adapter.
const TAGS: [&str; 2] = ["<lora:", "<lyco:"];

/// An adapter file: LoRA, LoCon, LoHa, LoKr, DoRA, IA³, OFT or whole differences, for the UNet, the text encoders or all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub struct LoraOptions {
    /// A safetensors file beneath a model root or in a folder `loras` there, with its ending or without; or the name of the
    /// file alone, wherever beneath a root it lies.
    #[serde(alias = "name", skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Times which it counts, -10 to 10. Default: 1.
    #[serde(alias = "scale", skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Times which it counts in the UNet, -10 to 10. Default: `weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet_weight: Option<f64>,
    /// Times which it counts in both text encoders, -10 to 10, where they have no weight of their own. Default: `weight`.
    #[serde(alias = "te_weight", skip_serializing_if = "Option::is_none")]
    pub text_encoder_weight: Option<f64>,
    /// Times which it counts in the second text encoder, -10 to 10. Default: `text_encoder_weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder_2_weight: Option<f64>,
    /// For parts of the UNet, such as `down_blocks.1`, `mid_block` or `up_blocks.0.attentions.1`, times which they count
    /// beside, -10 to 10; the longest name that a layer begins with is the layer's. Or a list of 12 or 20 numbers, as
    /// AUTOMATIC1111's LoRA Block Weight has them, the text encoders' first. Default: 1.
    #[serde(alias = "lbw", skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Blocks>,
}

impl LoraOptions {
    fn named(name: &str) -> Self {
        Self { model: Some(name.to_owned()), ..Self::default() }
    }
}

/// The field `loras`: a list, or its one element alone. A string is the element of that `model`.
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

/// An adapter of one kind or the other.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum AppliedAdapter {
    Picture(AdapterFacts),
    Lora(LoraFacts),
}

/// A request's adapters with every value decided, and the prompt without those that it named. `plain` prompts name none.
///
/// # Errors
/// `invalid_parameter` for weights out of range, tags that cannot be read and too many adapters; those of finding files.
pub(crate) fn choose(
    entries: Option<&LoraList>,
    prompt: &mut String,
    plain: bool,
    of: (&Catalog, &UnetConfig),
) -> Result<(Vec<LoraChoice>, Option<LoraList>)> {
    let said = entries.map_or(&[][..], |LoraList(entries)| entries);
    let tagged = if plain { Vec::new() } else { take_tags(prompt)? };
    let count = said.len() + tagged.len();
    if count > MOST {
        return Err(Error::invalid("loras", format!("must be at most {MOST}, got {count}")));
    }
    let (mut choices, mut decided): (Vec<LoraChoice>, Vec<LoraOptions>) = (Vec::new(), Vec::new());
    let listed = said.iter().enumerate().map(|(index, options)| (options, format!("loras.{index}"), None));
    let written = tagged.iter().map(|(options, tag)| (options, PROMPT.to_owned(), Some(tag)));
    for (options, field, tag) in listed.chain(written) {
        let at = |error: Error| match tag {
            Some(tag) => in_tag(error, tag),
            None => error.below(&field),
        };
        let (choice, options) = decide(options, &field, &choices, of).map_err(at)?;
        choices.push(choice);
        decided.push(options);
    }
    Ok((choices, (entries.is_some() || count > 0).then_some(LoraList(decided))))
}

/// An error of what a tag says: the request has no field for it but the prompt.
fn in_tag(error: Error, tag: &str) -> Error {
    match error {
        Error::InvalidParameter { field, message, hint } => {
            let message = format!("has `{tag}`, whose `{field}` {message}");
            Error::InvalidParameter { field: PROMPT.to_owned(), message, hint }
        }
        other => other,
    }
}

fn decide(
    options: &LoraOptions,
    field: &str,
    before: &[LoraChoice],
    (catalog, config): (&Catalog, &UnetConfig),
) -> Result<(LoraChoice, LoraOptions)> {
    let name =
        options.model.as_deref().ok_or_else(|| Error::invalid("model", "is missing: name a safetensors file"))?;
    let in_range = |field: &str, weight: f64| within(field, weight, -10.0, 10.0);
    let weight = in_range("weight", options.weight.unwrap_or(1.0))?;
    let unet = in_range("unet_weight", options.unet_weight.unwrap_or(weight))?;
    let text_encoder = in_range("text_encoder_weight", options.text_encoder_weight.unwrap_or(weight))?;
    let text_encoder_2 = in_range("text_encoder_2_weight", options.text_encoder_2_weight.unwrap_or(text_encoder))?;
    let named = options.blocks.as_ref().map(|blocks| blocks.named(config)).transpose()?;
    let (blocks, of_encoders) = named.unwrap_or((BTreeMap::new(), 1.0));
    let of_encoders = in_range("blocks.0", of_encoders)?;
    let text_encoder = in_range("text_encoder_weight", text_encoder * of_encoders)?;
    let text_encoder_2 = in_range("text_encoder_2_weight", text_encoder_2 * of_encoders)?;
    blocks.iter().try_for_each(|(block, &weight)| in_range(&format!("blocks.{block}"), weight).map(drop))?;
    let known = before.iter().find(|choice| choice.file.name == name).map(|choice| Arc::clone(&choice.file));
    let file = known.map_or_else(|| catalog.lora(name, "model").map(Arc::new), Ok)?;
    let decided = LoraOptions {
        model: Some(file.name.clone()),
        weight: Some(weight),
        unet_weight: Some(unet),
        text_encoder_weight: Some(text_encoder),
        text_encoder_2_weight: Some(text_encoder_2),
        blocks: options.blocks.as_ref().map(|_| Blocks::Named(blocks.clone())),
    };
    Ok((LoraChoice { file, field: field.to_owned(), unet, text_encoder, text_encoder_2, blocks }, decided))
}

/// Takes `<lora:name:weight>` and `<lora:name:encoders:unet>` out of a prompt, as AUTOMATIC1111 does
/// (`extensions-builtin/Lora/extra_networks_lora.py`): the first weight is the encoders', and the UNet's where it has none;
/// `te=` and `unet=` name them, and `lbw=` is a list of blocks' weights. Gives each with its text.
fn take_tags(prompt: &mut String) -> Result<Vec<(LoraOptions, String)>> {
    let (mut kept, mut entries) = (String::with_capacity(prompt.len()), Vec::new());
    let mut rest = prompt.as_str();
    let next = |rest: &str| TAGS.iter().filter_map(|tag| Some((rest.find(tag)?, tag.len()))).min();
    while let Some((start, length)) = next(rest) {
        let Some(end) = rest.get(start..).and_then(|tag| tag.find('>')).map(|end| start + end) else { break };
        kept.push_str(rest.get(..start).unwrap_or_default());
        let options = tag(rest.get(start + length..end).unwrap_or_default())?;
        entries.push((options, rest.get(start..=end).unwrap_or_default().to_owned()));
        rest = rest.get(end + 1..).unwrap_or_default();
    }
    kept.push_str(rest);
    *prompt = kept;
    Ok(entries)
}

/// What stands between `<lora:` and `>`.
fn tag(text: &str) -> Result<LoraOptions> {
    let mut parts = text.split(':');
    let name = parts.next().unwrap_or_default().trim();
    if name.is_empty() {
        return Err(Error::invalid(PROMPT, format!("names no file in `<lora:{text}>`")));
    }
    let (mut encoders, mut unet, mut blocks, mut place) = (None, None, None, 0);
    for part in parts {
        if let Some(list) = part.trim().strip_prefix("lbw=") {
            let weights: Option<Vec<f64>> = list.split(',').map(|weight| weight.trim().parse().ok()).collect();
            let message = || format!("must have numbers for `{part}` in `<lora:{text}>`");
            blocks = Some(Blocks::Listed(weights.ok_or_else(|| Error::invalid(PROMPT, message()))?));
            continue;
        }
        let (which, weight) = part.split_once('=').map_or((None, part), |(which, weight)| (Some(which.trim()), weight));
        let weight: Option<f64> = weight.trim().parse().ok().filter(|weight: &f64| weight.is_finite());
        let to = match (which, place) {
            (Some("te"), _) => &mut encoders,
            (Some("unet"), _) => &mut unet,
            (None, 0) => &mut encoders,
            (None, 1) => &mut unet,
            _ => return Err(Error::invalid(PROMPT, format!("has `{part}` in `<lora:{text}>`, which says nothing"))),
        };
        place += usize::from(which.is_none());
        let Some(weight) = weight else {
            return Err(Error::invalid(PROMPT, format!("must have a number for `{part}` in `<lora:{text}>`")));
        };
        *to = Some(weight);
    }
    let weight = encoders.unwrap_or(1.0);
    let unet_weight = unet.filter(|unet| *unet != weight);
    Ok(LoraOptions { weight: Some(weight), unet_weight, blocks, ..LoraOptions::named(name) })
}

/// The prompt as AUTOMATIC1111 writes it into an image: with the adapters behind it.
pub(crate) fn written(prompt: &str, choices: &[LoraChoice]) -> String {
    let mut text = prompt.to_owned();
    for LoraChoice { file, unet, text_encoder, .. } in choices {
        let name = file.name.rsplit('/').next().unwrap_or_default();
        let name = name.strip_suffix(".safetensors").unwrap_or(name);
        let weights = if unet == text_encoder { unet.to_string() } else { format!("{text_encoder}:{unet}") };
        text.push_str(if text.is_empty() || text.ends_with(' ') { "" } else { " " });
        text.push_str(&format!("<lora:{name}:{weights}>"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Blocks, Catalog, Error, LoraOptions, UnetConfig, decide, take_tags};
    use crate::model::interface::Settings;
    use crate::model::networks::PerBlock;

    #[track_caller]
    fn check(prompt: &str, kept: &str, tags: &[(&str, f64, Option<f64>)]) {
        let mut text = prompt.to_owned();
        let entries =
            take_tags(&mut text).ok().map(|tags| tags.into_iter().map(|(options, _)| options).collect::<Vec<_>>());
        let wanted = tags.iter().map(|(name, weight, unet)| LoraOptions {
            weight: Some(*weight),
            unet_weight: *unet,
            ..LoraOptions::named(name)
        });
        assert_eq!((text.as_str(), entries), (kept, Some(wanted.collect())), "{prompt}");
    }

    #[test]
    fn tags_are_taken_out_of_the_prompt() {
        check("a cat", "a cat", &[]);
        check("a <lora:x> cat", "a  cat", &[("x", 1.0, None)]);
        check("a cat <lora:x:0.5><lora:y y:-1:2>", "a cat ", &[("x", 0.5, None), ("y y", -1.0, Some(2.0))]);
        check("<lora:x:unet=0.5>a", "a", &[("x", 1.0, Some(0.5))]);
        check("<lyco:x:te=0.5:unet=0.5>a", "a", &[("x", 0.5, None)]);
        check("a <lora:x", "a <lora:x", &[]);
        check("a <b> [<lora:x:1>:c:3]", "a <b> [:c:3]", &[("x", 1.0, None)]);
        for wrong in ["<lora:>", "<lora:x:much>", "<lora:x:1:1:1>", "<lora:x:nan>", "<lora:x:dyn=4>"] {
            assert!(take_tags(&mut wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_a_list_has_for_text_encoders_is_a_weight_like_any() {
        let unet = UnetConfig {
            block_out_channels: vec![320, 640, 1280],
            layers_per_block: PerBlock::Each(vec![2, 2, 2]),
            ..UnetConfig::default()
        };
        let catalog = Catalog::new(&Settings::default());
        for (first, weight, field) in
            [(f64::NAN, 1.0, "blocks.0"), (11.0, 1.0, "blocks.0"), (5.0, 3.0, "text_encoder_weight")]
        {
            let mut list = vec![1.0; 12];
            list[0] = first;
            let named = LoraOptions::named("nowhere");
            let options = LoraOptions { weight: Some(weight), blocks: Some(Blocks::Listed(list)), ..named };
            let Err(error) = decide(&options, "loras.0", &[], (&catalog, &unet)) else { panic!("{first} was taken") };
            assert!(matches!(&error, Error::InvalidParameter { field: at, .. } if at == field), "{first}: {error}");
        }
    }
}
