//! LoRAs of a request: those of its list, and those that its prompt names as AUTOMATIC1111's tags.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::inference::plan::limits::within;
use crate::inference::request::lora::{LoraList, LoraOptions};
use crate::inference::request::lora_blocks::BlockWeights;
use crate::model::catalog::Catalog;
use crate::model::lora::{LoraChoice, MOST};
use crate::model::networks::unet::UnetConfig;

/// The field that holds tags.
const PROMPT: &str = "prompt";
/// Beginnings of a tag.
const TAGS: [&str; 2] = ["<lora:", "<lyco:"];

/// The LoRAs of a request, in the order in which they are applied.
pub(crate) struct PlannedLoras {
    pub(crate) choices: Vec<LoraChoice>,
    /// The same as a request's list; `None` if the request names none.
    pub(crate) options: Option<LoraList>,
}

/// A LoRA named in the prompt.
#[derive(Debug)]
pub(crate) struct LoraTag {
    options: LoraOptions,
    /// The tag as it is written.
    text: String,
}

/// Plans the LoRAs of a request's list, then those of its prompt.
///
/// # Errors
/// `invalid_parameter` for weights out of range and too many adapters; those of finding files.
pub(crate) fn loras(
    requested: Option<&LoraList>,
    tags: &[LoraTag],
    catalog: &Catalog,
    unet: &UnetConfig,
) -> Result<PlannedLoras> {
    let entries = requested.map_or(&[][..], |LoraList(entries)| entries);
    let count = entries.len() + tags.len();
    if count > MOST {
        return Err(Error::invalid("loras", format!("must be at most {MOST}, got {count}")));
    }
    let (mut choices, mut decided) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let mut add = |options: &LoraOptions, field: &str| -> Result<()> {
        let (mut choice, options) = choose(options, catalog, unet, &choices)?;
        field.clone_into(&mut choice.field);
        choices.push(choice);
        decided.push(options);
        Ok(())
    };
    for (index, options) in entries.iter().enumerate() {
        let field = format!("loras.{index}");
        add(options, &field).map_err(|error| error.below(&field))?;
    }
    for LoraTag { options, text } in tags {
        add(options, PROMPT).map_err(|error| in_tag(error, text))?;
    }
    let options = (requested.is_some() || count > 0).then_some(LoraList(decided));
    Ok(PlannedLoras { choices, options })
}

/// An error in a tag, whose values have no field of their own.
fn in_tag(error: Error, tag: &str) -> Error {
    match error {
        Error::InvalidParameter { field, message, hint } => {
            let message = format!("has `{tag}`, whose `{field}` {message}");
            Error::InvalidParameter { field: PROMPT.to_owned(), message, hint }
        }
        other => other,
    }
}

/// One LoRA after `earlier`, as a choice without its field, and as options with every value decided.
fn choose(
    options: &LoraOptions,
    catalog: &Catalog,
    unet: &UnetConfig,
    earlier: &[LoraChoice],
) -> Result<(LoraChoice, LoraOptions)> {
    let name =
        options.model.as_deref().ok_or_else(|| Error::invalid("model", "is missing: name a safetensors file"))?;
    let in_range = |field: &str, weight: f64| within(field, weight, -10.0, 10.0);
    let weight = in_range("weight", options.weight.unwrap_or(1.0))?;
    let unet_weight = in_range("unet_weight", options.unet_weight.unwrap_or(weight))?;
    let text_encoder = in_range("text_encoder_weight", options.text_encoder_weight.unwrap_or(weight))?;
    let text_encoder_2 = in_range("text_encoder_2_weight", options.text_encoder_2_weight.unwrap_or(text_encoder))?;
    let named = options.blocks.as_ref().map(|blocks| blocks.named(unet)).transpose()?;
    let (blocks, of_encoders) = named.unwrap_or((BTreeMap::new(), 1.0));
    let of_encoders = in_range("blocks.0", of_encoders)?;
    let text_encoder = in_range("text_encoder_weight", text_encoder * of_encoders)?;
    let text_encoder_2 = in_range("text_encoder_2_weight", text_encoder_2 * of_encoders)?;
    blocks.iter().try_for_each(|(block, &weight)| in_range(&format!("blocks.{block}"), weight).map(drop))?;
    let known = earlier.iter().find(|choice| choice.file.name == name).map(|choice| Arc::clone(&choice.file));
    let file = known.map_or_else(|| catalog.lora(name, "model").map(Arc::new), Ok)?;
    let decided = LoraOptions {
        model: Some(file.name.clone()),
        weight: Some(weight),
        unet_weight: Some(unet_weight),
        text_encoder_weight: Some(text_encoder),
        text_encoder_2_weight: Some(text_encoder_2),
        blocks: options.blocks.as_ref().map(|_| BlockWeights::Named(blocks.clone())),
    };
    let field = String::new();
    Ok((LoraChoice { file, field, unet: unet_weight, text_encoder, text_encoder_2, blocks }, decided))
}

/// Takes `<lora:name:weight>` and `<lora:name:encoders:unet>` out of a prompt, as AUTOMATIC1111 does
/// (`extensions-builtin/Lora/extra_networks_lora.py`): the first weight is the encoders', and the UNet's where it has none;
/// `te=` and `unet=` name them, and `lbw=` is a list of blocks' weights.
///
/// # Errors
/// `invalid_parameter` for tags that cannot be read.
pub(crate) fn take_tags(prompt: &mut String) -> Result<Vec<LoraTag>> {
    let (mut kept, mut entries) = (String::with_capacity(prompt.len()), Vec::new());
    let mut rest = prompt.as_str();
    let next = |rest: &str| TAGS.iter().filter_map(|tag| Some((rest.find(tag)?, tag.len()))).min();
    while let Some((start, length)) = next(rest) {
        let Some(end) = rest.get(start..).and_then(|tag| tag.find('>')).map(|end| start + end) else { break };
        kept.push_str(rest.get(..start).unwrap_or_default());
        let options = tag(rest.get(start + length..end).unwrap_or_default())?;
        entries.push(LoraTag { options, text: rest.get(start..=end).unwrap_or_default().to_owned() });
        rest = rest.get(end + 1..).unwrap_or_default();
    }
    kept.push_str(rest);
    *prompt = kept;
    Ok(entries)
}

/// The text between `<lora:` and `>`.
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
            blocks = Some(BlockWeights::Listed(weights.ok_or_else(|| Error::invalid(PROMPT, message()))?));
            continue;
        }
        let (which, weight) = part.split_once('=').map_or((None, part), |(which, weight)| (Some(which.trim()), weight));
        let weight: Option<f64> = weight.trim().parse().ok().filter(|weight: &f64| weight.is_finite());
        let to = match (which, place) {
            (Some("te"), _) => &mut encoders,
            (Some("unet"), _) => &mut unet,
            (None, 0) => &mut encoders,
            (None, 1) => &mut unet,
            _ => return Err(Error::invalid(PROMPT, format!("has `{part}` in `<lora:{text}>`, which has no meaning"))),
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

#[cfg(test)]
mod tests {
    use super::{BlockWeights, Catalog, Error, LoraOptions, UnetConfig, choose, take_tags};
    use crate::model::interface::Settings;
    use crate::model::networks::PerBlock;

    #[track_caller]
    fn check(prompt: &str, kept: &str, tags: &[(&str, f64, Option<f64>)]) {
        let mut text = prompt.to_owned();
        let entries = take_tags(&mut text).ok().map(|tags| tags.into_iter().map(|tag| tag.options).collect::<Vec<_>>());
        let wanted = tags.iter().map(|(name, weight, unet)| LoraOptions {
            weight: Some(*weight),
            unet_weight: *unet,
            ..LoraOptions::named(name)
        });
        assert_eq!((text.as_str(), entries), (kept, Some(wanted.collect())), "{prompt}");
    }

    #[test]
    fn lora_tags_are_removed_from_the_prompt() {
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
    fn text_encoder_weight_of_a_block_list_is_checked() {
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
            let options = LoraOptions { weight: Some(weight), blocks: Some(BlockWeights::Listed(list)), ..named };
            let Err(error) = choose(&options, &catalog, &unet, &[]) else { panic!("{first} was taken") };
            assert!(matches!(&error, Error::InvalidParameter { field: at, .. } if at == field), "{first}: {error}");
        }
    }
}
