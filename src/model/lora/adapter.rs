//! One adapter file, matched with the layers of a checkpoint. Its tensors are read when a network is built.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use candle_core::{Device, Tensor};

use crate::context::Context;
use crate::device::interface::Dtype;
use crate::error::{Error, Result, nearest};
use crate::kernels::WeightSource;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::choice::{LoraChoice, LoraFacts};
use crate::model::lora::formats;
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::{Parts, part_limit};
use crate::model::lora::keys::{LayerIndex, LayerParts, MatchKeys, MatchTask, PartRef};
use crate::model::lora::merge::LayerPatch;
use crate::model::lora::peft::Peft;
use crate::model::weights::open::{StoredDtype, Weights};
use crate::model::weights::read::{Read, ReadTask};

/// The part that, divided by the rank, scales a change.
const ALPHA: &str = "alpha";
/// Most skipped keys that a report names.
const NAMED: usize = 5;

/// An adapter file, and which layers it changes.
pub(crate) struct LoraAdapter {
    pub(crate) choice: LoraChoice,
    pub(crate) layers: BTreeMap<(Part, String), StoredPatch>,
    pub(crate) facts: LoraFacts,
    weights: Weights,
}

/// The parts of a file for one layer, not read yet.
pub(crate) struct StoredPatch {
    weight: Option<&'static AdapterFormat>,
    bias: Option<&'static AdapterFormat>,
    parts: LayerParts,
    /// Parts that are single numbers and not float tensors.
    numbers: BTreeMap<String, f64>,
}

impl LoraAdapter {
    /// Matches the keys of a file with the layers of `networks`, which are those of `checkpoint`.
    ///
    /// # Errors
    /// The errors of [`super::LoraStack::open`].
    pub(crate) fn open(
        choice: &LoraChoice,
        checkpoint: &Checkpoint,
        networks: &[(Part, LayerIndex)],
        ctx: &Context,
    ) -> Result<Self> {
        if let Some(unet) = index_of(networks, Part::Unet) {
            choice.blocks.keys().try_for_each(|block| check_block(block, choice, unet, checkpoint))?;
        }
        let weights = choice.file.open(ctx)?;
        let layers_per_block = checkpoint.unet.layers_per_block.values().first().copied().unwrap_or(2);
        let matched = ctx.perform(&MatchKeys, MatchTask { adapter: &weights, networks, layers_per_block })?;
        let stored = weights.tensors().map(|(name, stored)| (name, (stored.dtype, stored.shape.as_slice())));
        let mut selection = Selection {
            choice,
            model: &checkpoint.name,
            networks,
            weights: &weights,
            stored: stored.collect(),
            peft: Peft::read(&choice.file, &weights)?,
            formats: BTreeSet::new(),
            components: BTreeSet::new(),
            applied: BTreeSet::new(),
            matched: BTreeSet::new(),
        };
        let mut layers = BTreeMap::new();
        for ((part, layer), parts) in matched.layers {
            if let Some(patch) = selection.patch(part, &layer, parts)? {
                layers.insert((part, layer), patch);
            }
        }
        let facts = selection.facts(matched.unknown)?;
        Ok(Self { choice: choice.clone(), layers, facts, weights })
    }

    /// Reads the changes to a network, except for the layers `shared`. `adapter` is this adapter's index.
    pub(crate) fn read_patches(
        &self,
        adapter: usize,
        part: Part,
        shared: &HashSet<&str>,
        ctx: &Context,
    ) -> Result<Vec<(String, LayerPatch)>> {
        let mut wanted: Vec<(&String, &StoredPatch, f64)> = Vec::new();
        for ((own, layer), patch) in &self.layers {
            let strength = self.choice.strength(part, layer);
            if *own == part && strength != 0.0 && !shared.contains(layer.as_str()) {
                wanted.push((layer, patch, strength));
            }
        }
        let mut tensors = self.read(wanted.iter().flat_map(|(_, patch, _)| patch.parts.values()), ctx)?;
        let mut patches = Vec::with_capacity(wanted.len());
        for (layer, patch, strength) in wanted {
            let read = |(name, part): (&String, &PartRef)| Ok((name.clone(), take(&mut tensors, part)?));
            let mut parts: Parts = patch.parts.iter().map(read).collect::<Result<_>>()?;
            for (name, number) in &patch.numbers {
                parts.insert(name.clone(), Tensor::new(*number as f32, &Device::Cpu)?);
            }
            let StoredPatch { weight, bias, .. } = *patch;
            patches.push((layer.clone(), LayerPatch { adapter, weight, bias, parts, strength }));
        }
        Ok(patches)
    }

    /// The wanted tensors of the file, on the CPU and as they are stored.
    fn read<'s>(&self, wanted: impl Iterator<Item = &'s PartRef>, ctx: &Context) -> Result<HashMap<String, Tensor>> {
        let wanted: BTreeSet<&str> = wanted.map(|part| part.key.as_str()).collect();
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        let task = ReadTask { component: "lora", weights: &self.weights, compute: Dtype::F32, device: &Device::Cpu };
        let read = |source: &dyn WeightSource| -> Result<HashMap<String, Tensor>> {
            let one = |key: &str| Ok((key.to_owned(), source.numbers(key, None)?));
            wanted.into_iter().map(one).collect()
        };
        ctx.perform(&Read, task)?.build(ctx, read)
    }
}

/// A part of a change, or its third of the rows.
fn take(tensors: &mut HashMap<String, Tensor>, part: &PartRef) -> Result<Tensor> {
    let tensor = tensors.get(&part.key).ok_or_else(|| Error::bug("a part of an adapter was not read"))?;
    match part.third {
        None => Ok(tensor.clone()),
        Some(third) => {
            let rows = tensor.dim(0)? / 3;
            Ok(tensor.narrow(0, third * rows, rows)?)
        }
    }
}

fn index_of(networks: &[(Part, LayerIndex)], part: Part) -> Option<&LayerIndex> {
    networks.iter().find(|(known, _)| *known == part).map(|(_, index)| index)
}

/// Selects the parts of a file that its formats read, layer by layer, and counts them for the report.
struct Selection<'a> {
    choice: &'a LoraChoice,
    model: &'a str,
    networks: &'a [(Part, LayerIndex)],
    weights: &'a Weights,
    /// Dtype and shape by key.
    stored: HashMap<&'a str, (StoredDtype, &'a [usize])>,
    peft: Peft,
    formats: BTreeSet<&'static str>,
    components: BTreeSet<Part>,
    /// Keys that are read.
    applied: BTreeSet<String>,
    /// Keys that belong to a layer of the checkpoint.
    matched: BTreeSet<String>,
}

impl Selection<'_> {
    fn refuse(&self, message: String) -> Error {
        Error::ModelUnsupported { name: self.choice.file.name.clone(), message }
    }

    /// The shape of a tensor of the checkpoint's layer.
    fn base_shape(&self, part: Part, layer: &str, tensor: &str) -> Option<&[usize]> {
        index_of(self.networks, part)?.shape(&format!("{layer}.{tensor}"))
    }

    fn stored_shape(&self, key: &str) -> &[usize] {
        self.stored.get(key).map_or(&[], |(_, shape)| shape)
    }

    /// The change to one layer; `None` if no known format matches its parts.
    fn patch(&mut self, part: Part, layer: &str, parts: LayerParts) -> Result<Option<StoredPatch>> {
        self.check_text_width(part, layer, &parts)?;
        let (weight, bias) = (self.base_shape(part, layer, "weight"), self.base_shape(part, layer, "bias"));
        let formats = LayerFormats::detect(&parts, weight.is_some(), bias.is_some());
        // A header may claim a size that cannot be read; no format uses more.
        let limit = weight.or(bias).map_or(0, part_limit);
        let mut numbers = self.select(layer, &parts, formats, limit)?;
        self.formats.extend(formats.names());
        if formats.names().next().is_none() {
            return Ok(None);
        }
        self.components.insert(part);
        if !parts.contains_key(ALPHA) {
            let shape = |name: &str| Some(self.stored.get(parts.get(name)?.key.as_str())?.1);
            numbers.extend(self.peft.alpha(part, layer, shape).map(|alpha| (ALPHA.to_owned(), alpha)));
        }
        let is_read = |name: &str| formats.read(name) && !numbers.contains_key(name);
        let parts = parts.into_iter().filter(|(name, _)| is_read(name)).collect();
        let LayerFormats { weight, bias } = formats;
        Ok(Some(StoredPatch { weight: weight.map(|(_, f)| f), bias: bias.map(|(_, f)| f), parts, numbers }))
    }

    /// Refuses a file whose cross-attention reads text of another width, that is, of another model family.
    fn check_text_width(&self, part: Part, layer: &str, parts: &LayerParts) -> Result<()> {
        if part != Part::Unet || !(layer.ends_with("attn2.to_k") || layer.ends_with("attn2.to_v")) {
            return Ok(());
        }
        let width = self.base_shape(part, layer, "weight").and_then(|shape| shape.get(1)).copied();
        let down = parts.get("lora_down.weight");
        let reads = down.and_then(|down| self.stored_shape(&down.key).get(1)).copied();
        match (reads, width) {
            (Some(reads), Some(width)) if reads != width => Err(self.refuse(other_family(reads, width, self.model))),
            _ => Ok(()),
        }
    }

    /// Marks the parts that `formats` read as applied, and returns those that are whole numbers.
    fn select(
        &mut self,
        layer: &str,
        parts: &LayerParts,
        formats: LayerFormats,
        limit: usize,
    ) -> Result<BTreeMap<String, f64>> {
        let mut numbers = BTreeMap::new();
        for (name, PartRef { key, third }) in parts {
            self.matched.insert(key.clone());
            if !formats.read(name) {
                continue;
            }
            let shape = self.stored_shape(key);
            let count = shape.iter().fold(1_usize, |product, &side| product.saturating_mul(side));
            if count > limit.saturating_mul(if third.is_some() { 3 } else { 1 }) {
                return Err(self.refuse(format!("`{key}` of shape {shape:?} does not fit `{layer}`")));
            }
            if let Some((dtype @ StoredDtype::Other(_), _)) = self.stored.get(key.as_str()) {
                let Some(number) = self.weights.whole_number(key)? else {
                    return Err(self.refuse(format!("`{key}` is stored as {}, and must be a float", dtype.name())));
                };
                numbers.insert(name.clone(), number);
            }
            self.applied.insert(key.clone());
        }
        Ok(numbers)
    }

    /// The report; `unknown` are the keys that match no layer.
    fn facts(self, unknown: Vec<String>) -> Result<LoraFacts> {
        if self.applied.is_empty() {
            return Err(self.refuse(no_match(&unknown, self.matched.first(), self.model)));
        }
        let unused = self.matched.difference(&self.applied).cloned();
        let skipped: BTreeSet<String> = unknown.into_iter().chain(unused).collect();
        let components = Part::ALL.into_iter().filter(|part| self.components.contains(part)).map(Part::name).collect();
        Ok(LoraFacts {
            kind: "lora",
            model: self.choice.file.name.clone(),
            formats: self.formats.into_iter().collect(),
            components,
            applied: self.applied.len(),
            skipped: skipped.len(),
            skipped_keys: skipped.into_iter().take(NAMED).collect(),
            ms: 0.0,
        })
    }
}

/// The formats of a layer's weight and bias, with their names.
#[derive(Clone, Copy)]
struct LayerFormats {
    weight: Option<(&'static str, &'static AdapterFormat)>,
    bias: Option<(&'static str, &'static AdapterFormat)>,
}

impl LayerFormats {
    fn detect(parts: &LayerParts, has_weight: bool, has_bias: bool) -> Self {
        let format = |tensor: &str| formats::detect(tensor, |part| parts.contains_key(part));
        Self { weight: format("weight").filter(|_| has_weight), bias: format("bias").filter(|_| has_bias) }
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        [self.weight, self.bias].into_iter().flatten().map(|(name, _)| name)
    }

    /// True if a format reads this part.
    fn read(self, part: &str) -> bool {
        [self.weight, self.bias].into_iter().flatten().any(|(_, format)| format.parts.contains(&part))
    }
}

fn check_block(block: &str, choice: &LoraChoice, unet: &LayerIndex, checkpoint: &Checkpoint) -> Result<()> {
    if unet.has_block(block) {
        return Ok(());
    }
    let blocks = unet.blocks();
    let hint = nearest(block, blocks.iter().copied()).map(|name| format!("did you mean `{name}`?"));
    let message = format!("`{block}` is no block of the UNet of `{}`", checkpoint.name);
    // A prompt that names an adapter has no field below it.
    let field = if choice.field == "prompt" { choice.field.clone() } else { format!("{}.blocks", choice.field) };
    Err(Error::InvalidParameter { field, message, hint })
}

/// The message for a file whose cross-attention has another width.
fn other_family(reads: usize, width: usize, model: &str) -> String {
    let family = match reads {
        768 => "Stable Diffusion 1.5",
        1024 => "Stable Diffusion 2",
        1280 => "SDXL's refiner",
        2048 => "SDXL",
        _ => "another model",
    };
    format!("it is for {family}: its cross-attention reads {reads} channels of text, and `{model}` has {width}")
}

/// The message for a file of which no key applies.
fn no_match(unknown: &[String], known: Option<&String>, model: &str) -> String {
    const OTHERS: [(&str, &str); 9] = [
        ("double_blocks", "Flux"),
        ("single_blocks", "Flux"),
        ("single_transformer_blocks", "Flux"),
        ("joint_blocks", "Stable Diffusion 3"),
        ("lora_te3", "Stable Diffusion 3"),
        ("lora_transformer_", "a transformer such as Flux or Stable Diffusion 3"),
        ("transformer.transformer_blocks", "a transformer such as Flux or Stable Diffusion 3"),
        ("diffusion_model.blocks.", "a video model such as Wan"),
        ("lora_prior_unet", "Stable Cascade"),
    ];
    let other = OTHERS.iter().find(|(mark, _)| unknown.iter().any(|key| key.contains(mark)));
    match (other, unknown.first(), known) {
        (Some((_, other)), ..) => format!("nothing of it applies to `{model}`: its keys are those of {other}"),
        (None, Some(key), _) => {
            format!("nothing of it applies to `{model}`: its keys, such as `{key}`, name no layer of it")
        }
        (None, None, Some(key)) => {
            format!("nothing of it applies to `{model}`: `{key}` and the like are of no format that is known")
        }
        (None, None, None) => "it has no tensors".to_owned(),
    }
}
