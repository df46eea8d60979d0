//! LoRA and its relatives: adapter files, how strongly each counts, and what they change of a checkpoint. Their weights are
//! read where a network is built from them.

pub(crate) mod formats;
pub(crate) mod fused;
pub(crate) mod keys;
pub(crate) mod lookup;
pub(crate) mod merge;
pub(crate) mod peft;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use serde::Serialize;

use crate::context::Context;
use crate::device::interface::Dtype;
use crate::error::{Error, Result, nearest};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::{Checkpoint, CheckpointKey, Part};
use crate::model::lora::formats::{Format, Parts};
use crate::model::lora::keys::{Held, Name, NameTask, Source, Table};
use crate::model::lora::merge::{Touch, Touches};
use crate::model::lora::peft::Peft;
use crate::model::weights::open::{StoredDtype, Weights};
use crate::model::weights::read::{Read, ReadTask};

/// Most adapters of one request.
pub const MOST: usize = 32;
/// The part by which, over the rank, a change counts.
const ALPHA: &str = "alpha";
/// Keys that a report names of those that were skipped.
const NAMED: usize = 5;
/// An adapter file, and times which it counts.
#[derive(Clone, Debug)]
pub struct LoraChoice {
    pub file: Arc<ComponentFile>,
    /// The part of the request that it stands in.
    pub field: String,
    pub unet: f64,
    pub text_encoder: f64,
    pub text_encoder_2: f64,
    /// For parts of the UNet, times which they count beside; the longest name of a layer's blocks is the layer's.
    pub blocks: BTreeMap<String, f64>,
}

/// What an adapter did with its file.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct LoraFacts {
    /// `lora`, whatever its format.
    pub kind: &'static str,
    /// As the request named it.
    pub model: String,
    /// Formats of its layers.
    pub formats: Vec<&'static str>,
    /// Networks that it changes: `unet`, `text_encoder`, `text_encoder_2`.
    pub components: Vec<&'static str>,
    /// Tensors of the file that were applied.
    pub applied: usize,
    /// Tensors of the file that were not.
    pub skipped: usize,
    /// The first of those that were not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skipped_keys: Vec<String>,
    /// Milliseconds that this request spent on it; few where the changed network was in memory.
    pub ms: f64,
}

/// The adapters of a request and what they change of one checkpoint. An empty one changes nothing.
#[derive(Default)]
pub struct Stack {
    loras: Vec<Lora>,
    names: Vec<String>,
    spent: Mutex<Vec<Duration>>,
}

struct Lora {
    choice: LoraChoice,
    weights: Weights,
    layers: BTreeMap<(Part, String), Change>,
    facts: LoraFacts,
}

/// What a file holds for a layer.
struct Change {
    weight: Option<&'static Format>,
    bias: Option<&'static Format>,
    held: Held,
    /// Parts that are numbers and no tensors of floats.
    numbers: BTreeMap<String, f64>,
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.names).finish()
    }
}

impl LoraChoice {
    fn strength(&self, part: Part, layer: &str) -> f64 {
        match part {
            Part::Unet => {
                let holds = |block: &str| {
                    layer.strip_prefix(block).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                };
                let block = self.blocks.iter().filter(|(block, _)| holds(block)).max_by_key(|(block, _)| block.len());
                self.unet * block.map_or(1.0, |(_, weight)| *weight)
            }
            Part::TextEncoder => self.text_encoder,
            Part::TextEncoder2 => self.text_encoder_2,
            Part::Vae => 0.0,
        }
    }
}

impl Stack {
    /// Finds what the files change of `checkpoint`.
    ///
    /// # Errors
    /// `model_unsupported` for a file of which nothing can be applied, or that is for another kind of model;
    /// `invalid_parameter` for a block that the UNet does not have; those of opening files.
    pub fn open(choices: &[LoraChoice], checkpoint: &Checkpoint, ctx: &Context) -> Result<Self> {
        if choices.is_empty() {
            return Ok(Self::default());
        }
        let parts = checkpoint.parts().filter(|part| *part != Part::Vae);
        let table = |part: Part| Ok((part, Table::new(&checkpoint.open(part, ctx)?)));
        let networks = parts.map(table).collect::<Result<Vec<_>>>()?;
        let (mut loras, mut spent) = (Vec::new(), Vec::new());
        for choice in choices {
            let begun = Instant::now();
            loras.push(Lora::open(choice, checkpoint, &networks, ctx)?);
            spent.push(begun.elapsed());
        }
        let names = choices.iter().map(|choice| choice.file.name.clone()).collect();
        Ok(Self { loras, names, spent: Mutex::new(spent) })
    }

    /// What each adapter did.
    #[must_use]
    pub fn facts(&self) -> Vec<LoraFacts> {
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |(lora, spent): (&Lora, &Duration)| {
            let ms = (spent.as_secs_f64() * 1e4).round() / 10.0;
            LoraFacts { ms, ..lora.facts.clone() }
        };
        self.loras.iter().zip(spent.iter()).map(told).collect()
    }

    /// Tells these changes of a network from all others; `None` where it is not changed.
    #[must_use]
    pub fn key(&self, parts: &[Part]) -> Option<CheckpointKey> {
        let mut all: Vec<(Part, Vec<(String, u64)>)> = Vec::new();
        for &part in parts {
            let mut marks: Vec<(String, u64)> = self.marks(part).into_iter().collect();
            marks.sort();
            all.push((part, marks));
        }
        all.iter().any(|(_, marks)| !marks.is_empty()).then(|| CheckpointKey::of(&all))
    }

    /// For each layer that is changed what tells its changes from all others.
    pub(crate) fn marks(&self, part: Part) -> HashMap<String, u64> {
        let mut hashers: HashMap<&str, DefaultHasher> = HashMap::new();
        for lora in &self.loras {
            for ((_, layer), _) in lora.layers.iter().filter(|((own, _), _)| *own == part) {
                let strength = lora.choice.strength(part, layer);
                if strength != 0.0 {
                    (lora.choice.file.key, strength.to_bits()).hash(hashers.entry(layer).or_default());
                }
            }
        }
        hashers.into_iter().map(|(layer, hasher)| (layer.to_owned(), hasher.finish())).collect()
    }

    /// Reads what is changed of a network, but for the layers `known`.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn touches(&self, part: Part, known: &HashSet<&str>, ctx: &Context) -> Result<Touches<'_>> {
        let mut layers: BTreeMap<String, Vec<Touch>> = BTreeMap::new();
        for (adapter, lora) in self.loras.iter().enumerate() {
            let begun = Instant::now();
            let mut wanted: Vec<(&String, &Change, f64)> = Vec::new();
            for ((own, layer), change) in &lora.layers {
                let strength = lora.choice.strength(part, layer);
                if *own == part && strength != 0.0 && !known.contains(layer.as_str()) {
                    wanted.push((layer, change, strength));
                }
            }
            let mut tensors = lora.read(wanted.iter().flat_map(|(_, change, _)| change.held.values()), ctx)?;
            for (layer, change, strength) in wanted {
                let part = |(name, source): (&String, &Source)| Ok((name.clone(), take(&mut tensors, source)?));
                let mut parts: Parts = change.held.iter().map(part).collect::<Result<_>>()?;
                for (name, number) in &change.numbers {
                    parts.insert(name.clone(), Tensor::new(*number as f32, &Device::Cpu)?);
                }
                let touch = Touch { adapter, weight: change.weight, bias: change.bias, parts, strength };
                layers.entry(layer.clone()).or_default().push(touch);
            }
            self.took(adapter, begun.elapsed());
        }
        Ok(Touches { names: &self.names, layers })
    }

    pub(crate) fn took(&self, adapter: usize, time: Duration) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(spent) = spent.get_mut(adapter) {
            *spent += time;
        }
    }
}

/// A part of a change, or its third.
fn take(tensors: &mut HashMap<String, Tensor>, source: &Source) -> Result<Tensor> {
    let tensor = tensors.get(&source.key).ok_or_else(|| Error::bug("a part of an adapter was not read"))?;
    match source.third {
        None => Ok(tensor.clone()),
        Some(third) => {
            let rows = tensor.dim(0)? / 3;
            Ok(tensor.narrow(0, third * rows, rows)?)
        }
    }
}

impl Lora {
    fn open(choice: &LoraChoice, checkpoint: &Checkpoint, networks: &[(Part, Table)], ctx: &Context) -> Result<Self> {
        let table = |part: Part| networks.iter().find(|(known, _)| *known == part).map(|(_, table)| table);
        if let Some(unet) = table(Part::Unet) {
            choice.blocks.keys().try_for_each(|block| known_block(block, choice, unet, checkpoint))?;
        }
        let weights = choice.file.open(ctx)?;
        let layers = checkpoint.unet.layers_per_block.values().first().copied().unwrap_or(2);
        let named = ctx.perform(&Name, NameTask { adapter: &weights, networks, layers })?;
        let stored: HashMap<&str, (StoredDtype, &[usize])> =
            weights.tensors().map(|(name, stored)| (name, (stored.dtype, stored.shape.as_slice()))).collect();
        let peft = Peft::read(&choice.file, &weights)?;
        let refuse = |message: String| Error::ModelUnsupported { name: choice.file.name.clone(), message };
        let (mut formats, mut components) = (BTreeSet::new(), BTreeSet::new());
        let (mut applied, mut seen) = (BTreeSet::new(), BTreeSet::new());
        let mut layers = BTreeMap::new();
        for ((part, layer), held) in named.layers {
            let own = |tensor: &str| table(part).and_then(|table| table.shape(&format!("{layer}.{tensor}")));
            if let (true, Some(down), Some(own)) =
                (is_of_text(part, &layer), held.get("lora_down.weight"), own("weight"))
            {
                let reads = stored.get(down.key.as_str()).and_then(|(_, shape)| shape.get(1)).copied();
                if let (Some(reads), Some(&width)) = (reads, own.get(1))
                    && reads != width
                {
                    return Err(refuse(for_another(reads, width, &checkpoint.name)));
                }
            }
            let chosen = Chosen::of(&held, own("weight").is_some(), own("bias").is_some());
            // A header may claim what nobody can read: no format makes use of more.
            let most = own("weight").or_else(|| own("bias")).map_or(0, formats::part_limit);
            let mut numbers = BTreeMap::new();
            for (name, Source { key, third }) in &held {
                seen.insert(key.clone());
                if chosen.uses(name) {
                    let shape = stored.get(key.as_str()).map_or(&[][..], |(_, shape)| shape);
                    let count = shape.iter().fold(1_usize, |product, &side| product.saturating_mul(side));
                    if count > most.saturating_mul(if third.is_some() { 3 } else { 1 }) {
                        return Err(refuse(format!("`{key}` of shape {shape:?} does not fit `{layer}`")));
                    }
                    if let Some((dtype @ StoredDtype::Other(_), _)) = stored.get(key.as_str()) {
                        let Some(number) = weights.whole_number(key)? else {
                            return Err(refuse(format!("`{key}` is stored as {}, and must be a float", dtype.name())));
                        };
                        numbers.insert(name.clone(), number);
                    }
                    applied.insert(key.clone());
                }
            }
            let Chosen { weight, bias } = chosen;
            formats.extend(weight.iter().chain(&bias).map(|(name, _)| *name));
            if weight.is_none() && bias.is_none() {
                continue;
            }
            components.insert(part);
            if !held.contains_key(ALPHA) {
                let shape = |part: &str| Some(stored.get(held.get(part)?.key.as_str())?.1);
                numbers.extend(peft.alpha(part, &layer, shape).map(|alpha| (ALPHA.to_owned(), alpha)));
            }
            let is_read = |name: &str| chosen.uses(name) && !numbers.contains_key(name);
            let held: Held = held.into_iter().filter(|(name, _)| is_read(name)).collect();
            let (weight, bias) = (weight.map(|(_, format)| format), bias.map(|(_, format)| format));
            layers.insert((part, layer), Change { weight, bias, held, numbers });
        }
        if applied.is_empty() {
            return Err(refuse(nothing(&named.unknown, seen.first(), &checkpoint.name)));
        }
        let unused = seen.difference(&applied).cloned();
        let skipped: BTreeSet<String> = named.unknown.into_iter().chain(unused).collect();
        let components = Part::ALL.into_iter().filter(|part| components.contains(part)).map(Part::name).collect();
        let facts = LoraFacts {
            kind: "lora",
            model: choice.file.name.clone(),
            formats: formats.into_iter().collect(),
            components,
            applied: applied.len(),
            skipped: skipped.len(),
            skipped_keys: skipped.into_iter().take(NAMED).collect(),
            ms: 0.0,
        };
        Ok(Self { choice: choice.clone(), weights, layers, facts })
    }

    /// The tensors of the file that are named, on the CPU and as they are stored.
    fn read<'s>(&self, wanted: impl Iterator<Item = &'s Source>, ctx: &Context) -> Result<HashMap<String, Tensor>> {
        let wanted: BTreeSet<&str> = wanted.map(|source| source.key.as_str()).collect();
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        let task = ReadTask { component: "lora", weights: &self.weights, compute: Dtype::F32, device: &Device::Cpu };
        let read = |vb: &VarBuilder| -> Result<HashMap<String, Tensor>> {
            let one = |key: &str| Ok((key.to_owned(), vb.get_unchecked(key)?));
            wanted.into_iter().map(one).collect()
        };
        Ok(ctx.perform(&Read, task)?.build(ctx, read)?.0)
    }
}

/// The formats of a layer's weight and bias, with their names.
#[derive(Clone, Copy)]
struct Chosen {
    weight: Option<(&'static str, &'static Format)>,
    bias: Option<(&'static str, &'static Format)>,
}

impl Chosen {
    fn of(held: &Held, has_weight: bool, has_bias: bool) -> Self {
        let format = |tensor: &str| formats::of(tensor, |part| held.contains_key(part));
        Self { weight: format("weight").filter(|_| has_weight), bias: format("bias").filter(|_| has_bias) }
    }

    fn uses(self, part: &str) -> bool {
        [self.weight, self.bias].into_iter().flatten().any(|(_, format)| format.parts.contains(&part))
    }
}

fn known_block(block: &str, choice: &LoraChoice, unet: &Table, checkpoint: &Checkpoint) -> Result<()> {
    if unet.has_block(block) {
        return Ok(());
    }
    let blocks = unet.blocks();
    let hint = nearest(block, blocks.iter().map(String::as_str)).map(|name| format!("did you mean `{name}`?"));
    let message = format!("`{block}` is no block of the UNet of `{}`", checkpoint.name);
    // A prompt that names an adapter has no field below it.
    let field = if choice.field == "prompt" { choice.field.clone() } else { format!("{}.blocks", choice.field) };
    Err(Error::InvalidParameter { field, message, hint })
}

/// Whether the inputs of a layer are the text.
fn is_of_text(part: Part, layer: &str) -> bool {
    part == Part::Unet && (layer.ends_with("attn2.to_k") || layer.ends_with("attn2.to_v"))
}

/// Why a file whose cross-attention reads another text cannot be used.
fn for_another(reads: usize, width: usize, model: &str) -> String {
    let family = match reads {
        768 => "Stable Diffusion 1.5",
        1024 => "Stable Diffusion 2",
        1280 => "SDXL's refiner",
        2048 => "SDXL",
        _ => "another model",
    };
    format!("it is for {family}: its cross-attention reads text of {reads} channels, and that of `{model}` of {width}")
}

/// Why nothing of a file could be applied.
fn nothing(unknown: &[String], known: Option<&String>, model: &str) -> String {
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
