//! The adapters of a request, matched with one checkpoint.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::context::Context;
use crate::error::Result;
use crate::model::checkpoint::key::CheckpointKey;
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::adapter::LoraAdapter;
use crate::model::lora::choice::{LoraChoice, LoraFacts};
use crate::model::lora::keys::LayerIndex;
use crate::model::lora::merge::{LayerPatch, Patches};

/// Adapters in the order of the request. An empty stack changes nothing.
#[derive(Default)]
pub struct LoraStack {
    adapters: Vec<LoraAdapter>,
    names: Vec<String>,
    /// Time that each adapter took, for its report.
    spent: Mutex<Vec<Duration>>,
}

impl fmt::Debug for LoraStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.names).finish()
    }
}

impl LoraStack {
    /// Matches adapter files with the layers of `checkpoint`.
    ///
    /// # Errors
    /// `model_unsupported` for a file that changes no layer or is for another kind of model; `invalid_parameter` for a
    /// block that the UNet lacks; errors of opening files.
    pub fn open(choices: &[LoraChoice], checkpoint: &Checkpoint, ctx: &Context) -> Result<Self> {
        if choices.is_empty() {
            return Ok(Self::default());
        }
        let parts = checkpoint.parts().filter(|part| *part != Part::Vae);
        let index = |part: Part| Ok((part, LayerIndex::new(&checkpoint.open(part, ctx)?)));
        let networks = parts.map(index).collect::<Result<Vec<_>>>()?;
        let (mut adapters, mut spent) = (Vec::new(), Vec::new());
        for choice in choices {
            let begun = Instant::now();
            adapters.push(LoraAdapter::open(choice, checkpoint, &networks, ctx)?);
            spent.push(begun.elapsed());
        }
        let names = choices.iter().map(|choice| choice.file.name.clone()).collect();
        Ok(Self { adapters, names, spent: Mutex::new(spent) })
    }

    /// The report of each adapter.
    #[must_use]
    pub fn facts(&self) -> Vec<LoraFacts> {
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let with_time = |(adapter, spent): (&LoraAdapter, &Duration)| {
            let ms = (spent.as_secs_f64() * 1e4).round() / 10.0;
            LoraFacts { ms, ..adapter.facts.clone() }
        };
        self.adapters.iter().zip(spent.iter()).map(with_time).collect()
    }

    /// Identifies the changes to these networks, for caches; `None` if nothing changes them.
    #[must_use]
    pub fn key(&self, parts: &[Part]) -> Option<CheckpointKey> {
        let mut all: Vec<(Part, Vec<(String, u64)>)> = Vec::new();
        for &part in parts {
            let mut layers: Vec<(String, u64)> = self.fingerprints(part).into_iter().collect();
            layers.sort();
            all.push((part, layers));
        }
        all.iter().any(|(_, layers)| !layers.is_empty()).then(|| CheckpointKey::of(&all))
    }

    /// A hash of the changes of each changed layer.
    pub(crate) fn fingerprints(&self, part: Part) -> HashMap<String, u64> {
        let mut hashers: HashMap<&str, DefaultHasher> = HashMap::new();
        for adapter in &self.adapters {
            for ((_, layer), _) in adapter.layers.iter().filter(|((own, _), _)| *own == part) {
                let strength = adapter.choice.strength(part, layer);
                if strength != 0.0 {
                    (adapter.choice.file.key, strength.to_bits()).hash(hashers.entry(layer).or_default());
                }
            }
        }
        hashers.into_iter().map(|(layer, hasher)| (layer.to_owned(), hasher.finish())).collect()
    }

    /// Reads the changes to a network, except for the layers `shared`.
    ///
    /// # Errors
    /// Errors of reading files.
    pub(crate) fn patches(&self, part: Part, shared: &HashSet<&str>, ctx: &Context) -> Result<Patches<'_>> {
        let mut layers: BTreeMap<String, Vec<LayerPatch>> = BTreeMap::new();
        for (index, adapter) in self.adapters.iter().enumerate() {
            let begun = Instant::now();
            for (layer, patch) in adapter.read_patches(index, part, shared, ctx)? {
                layers.entry(layer).or_default().push(patch);
            }
            self.add_time(index, begun.elapsed());
        }
        Ok(Patches { names: &self.names, layers })
    }

    pub(crate) fn add_time(&self, adapter: usize, time: Duration) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(spent) = spent.get_mut(adapter) {
            *spent += time;
        }
    }
}
